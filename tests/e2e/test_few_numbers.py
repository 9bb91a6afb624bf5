"""Adapters of fewer numbers than R, from the request to the text: trained, stored, served and exported."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import safetensors.torch

from tests.e2e.conftest import Stack
from tests.e2e.test_openai_client import PROMPT, training_file
from tests.waiting import HANG_S, wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")


def train(client: openai.OpenAI, file_id: str, adapter: dict[str, Any]) -> Any:
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, seed=1, hyperparameters={"n_epochs": 2},
        extra_body={"adapter": adapter},
    )  # fmt: skip

    def ended() -> Any:
        found = client.fine_tuning.jobs.retrieve(job.id)
        return found if found.status in ("succeeded", "failed", "cancelled") else None

    done: Any = wait_until_sync(ended)
    assert done.status == "succeeded", done.error
    return done


@pytest.mark.parametrize(
    ("name", "adapter", "numbers"),
    [
        ("thirteen", {"rank": 2, "basis": "tinylora_thirteen"}, 13),
        ("rotated", {"rank": 4, "basis": "psoft"}, 42 * (4 * 3 // 2 + 2 * 4)),
    ],
)
def test_few_numbers_are_trained_stored_served_and_exported(
    stack: Stack, client: openai.OpenAI, tmp_path: Path, name: str, adapter: dict[str, Any], numbers: int
) -> None:
    file = client.files.create(file=training_file(tmp_path, 20), purpose="fine-tune")
    done = train(client, file.id, {"id": name, **adapter})
    version = httpx.get(f"{stack.url}/v1/adapters/{name}").json()["versions"][0]
    answers = [
        client.chat.completions.create(model=model, messages=PROMPT, max_tokens=12, temperature=0)
        for model in (name, "tiny")
    ]
    again = train(client, file.id, {"id": name, "basis": done.adapter["basis"], "init": "zero"})
    exported = httpx.get(f"{stack.url}/v1/adapters/{name}/peft", timeout=HANG_S)  # a process that loads torch
    archive = zipfile.ZipFile(io.BytesIO(exported.content))
    config = json.loads(archive.read("adapter_config.json"))
    tensors = safetensors.torch.load(archive.read("adapter_model.safetensors"))

    assert done.result["best_valid_loss"] <= done.result["initial_valid_loss"]
    assert version["dtype"] == "float16"
    assert version["bytes"] < 128 + 1024 + 2 * numbers  # header, provenance, numbers
    assert answers[0].adapter == {"id": name, "version": 1}  # type: ignore[attr-defined]
    assert answers[0].usage is not None
    assert again.adapter["version"] == 2
    assert (config["peft_type"], config["r"]) == ("LORA", adapter["rank"])
    assert len(tensors) == 2 * len(config["target_modules"])
