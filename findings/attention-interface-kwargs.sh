#!/usr/bin/env bash
# Keyword arguments of a forward pass do not reach a registered attention function in StableLM and Nemotron.
#
# Versions: transformers 5.23.0, torch 2.13.0. The documentation of `AttentionInterface` says that arguments given to
# the model's forward pass arrive in the attention function, and in Llama they do. The decoder layers of StableLM and
# Nemotron take **kwargs, as their signatures promise, and hand none of them to their attention, without an error or a
# warning. An attention function that needs such an argument (block tables, a step of a paged cache) fails or falls
# back there, though the model dispatches through the interface like all others.
#
# Output seen:
#   llama: the attention function got 'present'
#   stablelm: the attention function got None
#   nemotron: the attention function got None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

got = []


def attention(module, query, key, value, attention_mask, my_argument=None, **kwargs):
    got.append(my_argument)
    return query.transpose(1, 2), None


AttentionInterface.register("mine", attention)
seen = {}
for model_type in ("llama", "stablelm", "nemotron"):
    config = AutoConfig.for_model(
        model_type, vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="mine").eval()
    got.clear()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), my_argument="present", use_cache=False)
    seen[model_type] = got[0]
    print(f"{model_type}: the attention function got {got[0]!r}")
assert seen == {"llama": "present", "stablelm": None, "nemotron": None}, "the behaviour has changed"
PYTHON
