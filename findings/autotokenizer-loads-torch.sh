#!/usr/bin/env bash
# With torch installed, transformers 5.23.0 loads it to read a tokenizer through AutoTokenizer, and not through the class.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0. `import transformers` is lazy and loads no torch. Importing
# the name AutoTokenizer loads it already, because the automatic classes stand beside the tables of model configurations.
# PreTrainedTokenizerFast reads the same folder, gives the same ids and loads no torch. Without torch installed
# AutoTokenizer works too, so it does not need torch. A process that only tokenizes pays about 200 MB for the name.
#
# Output seen (resident memory varies by a few megabytes):
#   PreTrainedTokenizerFast: torch loaded by import: False, after reading: False; ids [0, 1]; 66 MB
#   AutoTokenizer: torch loaded by import: True, after reading: True; ids [0, 1]; 262 MB
#   AutoTokenizer without torch: torch loaded by import: False, after reading: False; ids [0, 1]; 68 MB
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv with
python3 -m venv without
for venv in with without; do
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet transformers==5.23.0 tokenizers==0.23.3
done
with/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0
cat >read.py <<'PYTHON'
import sys

import transformers

name = sys.argv[1]
assert "torch" not in sys.modules
cls = getattr(transformers, name)
by_import = "torch" in sys.modules
ids = cls.from_pretrained("tokenizer")("hello world")["input_ids"]
resident = int(open("/proc/self/statm").read().split()[1]) * 4096 // 10**6
label = name if len(sys.argv) < 3 else f"{name} {sys.argv[2]}"
print(f"{label}: torch loaded by import: {by_import}, after reading: {'torch' in sys.modules}; ids {ids}; {resident} MB")
PYTHON
without/bin/python - <<'PYTHON'
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "<unk>": 2}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
Path("tokenizer").mkdir()
tokenizer.save("tokenizer/tokenizer.json")
Path("tokenizer/tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
)
PYTHON
{
    with/bin/python read.py PreTrainedTokenizerFast
    with/bin/python read.py AutoTokenizer
    without/bin/python read.py AutoTokenizer "without torch"
} 2>/dev/null | tee output
grep -q "^PreTrainedTokenizerFast: torch loaded by import: False, after reading: False; ids \[0, 1\]" output
grep -q "^AutoTokenizer: torch loaded by import: True, after reading: True; ids \[0, 1\]" output
grep -q "^AutoTokenizer without torch: torch loaded by import: False, after reading: False; ids \[0, 1\]" output
