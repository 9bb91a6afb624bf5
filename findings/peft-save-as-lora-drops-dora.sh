#!/usr/bin/env bash
# peft.save_as_lora writes another model for DoRA, aLoRA and lora_bias, without an error.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
#
# `save_as_lora` refuses the LoRA variants that it cannot represent by asking each layer (`supports_lora_conversion`):
# KaSA says no, and ends in a TypeError. DoRA, aLoRA and lora_bias=True say yes. For them it writes B A scaled, leaves
# out the magnitude vector, the invocation tokens or the bias, and warns only that the adapter "is already a LoRA
# adapter". (The check for a bias looks at `bias`, which is "none", and never at `lora_bias`.) merge_and_unload of the
# same DoRA is exact.
#
# Output seen:
#   plain      change 0.67  error of save_as_lora 0.0000
#   dora       change 0.40  error of save_as_lora 0.18   error of merge_and_unload 0.0000
#   alora      change 0.61  error of save_as_lora 0.53
#   lora_bias  change 0.41  error of save_as_lora 0.32
#   kasa       TypeError
# (figures of the last digits vary with the machine)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'PY'
import logging
import sys
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.ERROR)
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT = torch.tensor([[1, 5, 9, 33, 2]])


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads)).eval()


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def distance(a, b):
    return float((a - b).abs().max())


KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [9], "task_type": "CAUSAL_LM"},
    "lora_bias": {"lora_bias": True},
    "kasa": {"kasa_config": peft.KasaConfig()},
}
errors = {}
for kind, options in KINDS.items():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    model = peft.get_peft_model(base(), config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    expected = logits(model)
    folder = f"{sys.argv[1]}/{kind}"
    try:
        peft.save_as_lora(folder, model, rank=16)
    except TypeError:
        print(f"{kind:10} TypeError")
        errors[kind] = None
        continue
    errors[kind] = distance(logits(peft.PeftModel.from_pretrained(base(), folder).eval()), expected)
    line = f"{kind:10} change {distance(expected, logits(base())):.2f}  error of save_as_lora {errors[kind]:.4f}"
    if kind == "dora":
        errors["merged"] = distance(logits(model.merge_and_unload()), expected)
        line += f"  error of merge_and_unload {errors['merged']:.4f}"
    print(line)
assert errors["plain"] < 1e-5 and errors["merged"] < 1e-5 and errors["kasa"] is None, errors
assert min(errors["dora"], errors["alora"], errors["lora_bias"]) > 0.05, errors
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
