"""Adapters with bases of their own, on a running stack: imported or trained, served, gone without trace."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import httpx
import openai
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from service.generation.text import load_text_codec
from tessera.defaults import BUNDLED_MODEL
from tests.e2e.conftest import DATA, Stack
from tests.waiting import HANG_S, wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")

PROMPT = [1, 17, 250, 999, 4000, 12]
NUM_TOKENS = 8


def lora_zip() -> tuple[bytes, str]:
    """A LoRA of two kinds of modules, zipped, and the greedy text of the model that it is merged into."""
    generator = torch.Generator().manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            d_out, d_in = module.weight.shape
            A = torch.randn(4, d_in, generator=generator) / d_in**0.5
            B = 4 * torch.randn(d_out, 4, generator=generator) / d_out**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = A
            tensors[f"base_model.model.{name}.lora_B.weight"] = B
            module.weight.data += 2 * B @ A
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("adapter_config.json", json.dumps(config))
        archive.writestr("adapter_model.safetensors", safetensors.torch.save(tensors))
    tokens = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    text = load_text_codec(BUNDLED_MODEL).decode(tokens[0, len(PROMPT) :].tolist())
    return content.getvalue(), text


def greedy(client: openai.OpenAI, model: str) -> str:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )  # fmt: skip
    return answer.choices[0].text


def test_a_lora_is_imported_served_exported_and_deleted(stack: Stack, client: openai.OpenAI) -> None:
    content, expected = lora_zip()
    url = f"{stack.url}/v1/adapters/foreign/peft"
    made = httpx.post(url, files={"file": ("lora.zip", content)}, timeout=HANG_S)
    assert made.status_code == 200, made.text
    basis_id = made.json()["versions"][0]["basis"]
    assert greedy(client, "foreign") == expected
    assert greedy(client, "tiny") != expected
    exported = httpx.get(url, timeout=HANG_S).content
    copy = httpx.post(
        f"{stack.url}/v1/adapters/copy/peft", files={"file": ("x.zip", exported)}, timeout=HANG_S
    )
    assert copy.json()["versions"][0]["basis"] == basis_id
    assert greedy(client, "copy") == expected
    for name in ("foreign", "copy"):
        client.models.delete(name)
    with stack.store() as store:
        assert list(store.scan_iter(match=f"*{basis_id}*")) == []
    with pytest.raises(openai.NotFoundError):
        greedy(client, "foreign")


def test_a_lora_form_is_trained_and_served(client: openai.OpenAI, tmp_path: Path) -> None:
    lines = (DATA / "devil.train.jsonl").read_text().splitlines()[:24]
    path = tmp_path / "devil.jsonl"
    path.write_text("\n".join(lines) + "\n")
    file = client.files.create(file=path, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        seed=7,
        hyperparameters={"n_epochs": 2, "batch_size": 4},
        extra_body={"adapter": {"id": "full", "form": "lora", "rank": 4, "init": "lora"}},
    )
    wait_until_sync(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"))
    told = client.fine_tuning.jobs.retrieve(job.id).to_dict()
    assert told["status"] == "succeeded", told["error"]
    assert told["result"]["best_valid_loss"] < told["result"]["initial_valid_loss"]
    assert (told["adapter"]["form"], told["adapter"]["basis"]) == ("lora", told["result"]["basis_id"])
    assert greedy(client, "full") != greedy(client, "tiny")
    client.models.delete("full")
