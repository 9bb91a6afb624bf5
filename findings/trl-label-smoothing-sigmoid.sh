#!/usr/bin/env bash
# TRL's DPOTrainer accepts label_smoothing with the loss "sigmoid" and ignores it.
#
# Versions: trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
#
# "Conservative DPO" is the sigmoid loss with smoothed labels, -(1 - ε) log σ(βΔ) - ε log σ(-βΔ). Many trainers, also
# ones that grew out of TRL's older code, compute it for loss_type="sigmoid" with label_smoothing=ε. In this release only
# "robust" and a few other losses read label_smoothing. With "sigmoid" it is neither refused nor warned of, and the loss is
# that of plain DPO.
#
# Affected: whoever moves a conservative-DPO recipe to a new TRL, or compares another trainer's losses with TRL's.
#
# Output seen:
#   sigmoid  0.0 and 0.3: largest difference over 4 steps 0.000000
#   robust   0.0 and 0.3: largest difference over 4 steps 1.865007
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 trl==1.16.0
cat > "$folder/try.py" <<'PY'
import logging
import sys
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

WORDS = "[PAD] [UNK] [EOS] what is the sky grass blue green red tall small yes no very".split()
PAIRS = [("what is the sky", "blue very", "green"), ("what is the grass", "green", "red small")] * 8


def losses(loss_type, smoothing):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = f"{sys.argv[1]}/model"  # the trainer loads its reference from where the model came from
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes, **heads)).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    options = DPOConfig(
        output_dir=f"{sys.argv[1]}/out", loss_type=loss_type, label_smoothing=smoothing, max_steps=4,
        logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to=[], save_strategy="no", seed=0, use_cpu=True, bf16=False, disable_tqdm=True, beta=1.0,
        gradient_checkpointing=False,
    )
    rows = [{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in PAIRS]
    trainer = DPOTrainer(model, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def difference(loss_type):
    plain, smoothed = losses(loss_type, 0.0), losses(loss_type, 0.3)
    assert len(plain) == len(smoothed) == 4
    return max(abs(a - b) for a, b in zip(plain, smoothed, strict=True))


sigmoid, robust = difference("sigmoid"), difference("robust")
print(f"sigmoid  0.0 and 0.3: largest difference over 4 steps {sigmoid:.6f}", file=sys.stderr)
print(f"robust   0.0 and 0.3: largest difference over 4 steps {robust:.6f}", file=sys.stderr)
assert sigmoid == 0.0, "label_smoothing has an effect on the sigmoid loss"
assert robust > 1e-3, "label_smoothing has no effect on the robust loss"
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder" > "$folder/log"
