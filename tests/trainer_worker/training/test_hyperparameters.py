"""Every hyperparameter of a job reaches its training and changes it, in the r x r form and in a LoRA form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.model.base_model import BaseModel
from tessera.queue.records import HYPERPARAMETERS
from tests.trainer_worker.world import World

#: Ten examples to train on, in batches of two.
SETTINGS: dict[str, Any] = {"n_epochs": 2, "batch_size": 2}
STEPS = 10
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "the defaults by name": {
        "learning_rate": "auto", "lr_scheduler_type": "cosine_with_min_lr", "weight_decay": 0,
        "max_length": 2048, "learning_rate_multiplier": 1.0,
    },
    "n_epochs": {"n_epochs": 1},
    "batch_size": {"batch_size": 5},
    "learning_rate_multiplier": {"learning_rate_multiplier": 0.5},
    "learning_rate": {"learning_rate": 1.25e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "warmup_ratio": {"warmup_ratio": 0.45},
    "weight_decay": {"weight_decay": 1.0},
    "max_length": {"max_length": 24},
}  # fmt: skip


@pytest.mark.parametrize("form", [{}, {"form": "lora", "method": "lora"}], ids=["core", "lora"])
async def test_each_changes_the_training(
    redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path, form: dict[str, Any]
) -> None:
    world = World(redis, tiny, chat, tmp_path)
    jobs = {
        name: await world.submit(
            adapter_id=f"a{index}",
            hyperparameters=SETTINGS | change,
            early_stopping={"patience": None},
            **form,
        )
        for index, (name, change) in enumerate(CHANGES.items())
    }
    rates: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    async with world.worker():
        for name, job_id in jobs.items():
            job = await world.ended(job_id, timeout_s=300)
            assert job.error is None, (name, job.error)
            assert job.result is not None
            steps = [e.data for e in await world.events(job_id) if "train_loss" in e.data]
            rates[name] = [data["learning_rate"] for data in steps]
            losses[name] = [data["train_loss"] for data in steps]
            tokens[name] = job.result["trained_tokens"]

    assert set(HYPERPARAMETERS) <= CHANGES.keys()
    assert rates["the defaults by name"] == rates["base"]
    assert losses["the defaults by name"] == pytest.approx(losses["base"], rel=1e-4)
    peak = max(rates["base"])
    assert len(losses["base"]) == STEPS
    assert len(losses["n_epochs"]) == STEPS / 2
    assert len(losses["batch_size"]) == STEPS * 2 / 5
    assert max(rates["learning_rate_multiplier"]) == pytest.approx(peak / 2)
    assert max(rates["learning_rate"]) == pytest.approx(1.25e-3)
    assert rates["lr_scheduler_type"][-1] == pytest.approx(peak / (STEPS - 1))
    assert rates["warmup_ratio"][:6] == pytest.approx([peak * k / 5 for k in (1, 2, 3, 4, 5, 5)])
    assert rates["weight_decay"] == rates["base"]
    assert tokens["max_length"] <= STEPS * 2 * 24 < tokens["base"]
    for name in HYPERPARAMETERS:
        assert losses[name] != pytest.approx(losses["base"], rel=1e-4), name
