"""Every hyperparameter of a job reaches its training and changes it, in the r x r form and in a LoRA form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.formats.adapter import Adapter
from tessera.model.base_model import BaseModel
from tessera.queue.client import Job, JobStatus
from tessera.queue.hyperparameters import HYPERPARAMETERS
from tests.trainer_worker.world import World
from trainer_worker.training.plan import ADAM_BETAS, ADAM_EPSILON

#: Ten examples to train on and two held back, in batches of two.
SETTINGS: dict[str, Any] = {"n_epochs": 2, "batch_size": 2}
STEPS = 10
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "the defaults by name": {
        "learning_rate": "auto", "lr_scheduler_type": "cosine_with_min_lr", "weight_decay": 0,
        "max_length": 2048, "learning_rate_multiplier": 1.0, "min_lr_ratio": 0.1, "optimizer": "adamw",
        "gradient_accumulation_steps": 1, "adam_beta1": ADAM_BETAS[0], "adam_beta2": ADAM_BETAS[1],
        "adam_epsilon": ADAM_EPSILON, "max_grad_norm": 1.0, "publish": "best", "momentum": "auto",
        "warmup_steps": 1,
    },
    "n_epochs": {"n_epochs": 1},
    "batch_size": {"batch_size": 5},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "learning_rate_multiplier": {"learning_rate_multiplier": 0.5},
    "learning_rate": {"learning_rate": 1.25e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "min_lr_ratio": {"min_lr_ratio": 0.5},
    "warmup_ratio": {"warmup_ratio": 0.45},
    "warmup_steps": {"warmup_steps": 3},
    "weight_decay": {"weight_decay": 1.0},
    "optimizer": SGD,
    "momentum": {**SGD, "momentum": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.8},
    "adam_epsilon": {"adam_epsilon": 1e-2},
    "max_grad_norm": {**SGD, "max_grad_norm": 0.01},
    "max_length": {"max_length": 24},
    "validation_split": {"validation_split": 0.5},
    "no validation": {"validation_split": 0},
    "publish": {"publish": "last"},
}  # fmt: skip
#: The published state differs, not the training.
NOT_IN_THE_STEPS = ("publish",)


def settings_of(change: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a job that does not search for its learning rate."""
    rate = {} if "learning_rate" in change else {"learning_rate_multiplier": 1.0}
    return SETTINGS | rate | change


@pytest.mark.parametrize("form", [{}, {"form": "lora", "method": "lora"}], ids=["core", "lora"])
async def test_each_changes_the_training(
    redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path, form: dict[str, Any]
) -> None:
    world = World(redis, tiny, chat, tmp_path)
    jobs = {
        name: await world.submit(
            adapter_id=f"a{index}",
            hyperparameters=settings_of(change),
            early_stopping={"patience": None},
            **form,
        )
        for index, (name, change) in enumerate(CHANGES.items())
    }
    rates: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    results: dict[str, dict[str, Any]] = {}
    async with world.worker():
        for name, job_id in jobs.items():
            job = await world.ended(job_id, timeout_s=300)
            assert job.error is None, (name, job.error)
            assert job.result is not None
            steps = [e.data for e in await world.events(job_id) if "train_loss" in e.data]
            rates[name] = [data["learning_rate"] for data in steps]
            losses[name] = [data["train_loss"] for data in steps]
            results[name] = job.result

    assert set(HYPERPARAMETERS) <= CHANGES.keys()
    assert rates["the defaults by name"] == rates["base"]
    assert losses["the defaults by name"] == pytest.approx(losses["base"], rel=1e-4)
    peak = max(rates["base"])
    assert len(losses["base"]) == STEPS
    assert len(losses["n_epochs"]) == STEPS / 2
    assert len(losses["batch_size"]) == STEPS * 2 / 5
    assert len(losses["gradient_accumulation_steps"]) == 2 * 3, "five batches of an epoch are three steps"
    assert results["gradient_accumulation_steps"]["batch_size"] == 4
    assert max(rates["learning_rate_multiplier"]) == pytest.approx(peak / 2)
    assert max(rates["learning_rate"]) == pytest.approx(1.25e-3)
    assert max(rates["optimizer"]) == pytest.approx(0.1)
    assert rates["lr_scheduler_type"][-1] == pytest.approx(peak / (STEPS - 1))
    assert rates["min_lr_ratio"][-1] > peak / 2 > 3 * rates["base"][-1]
    assert rates["warmup_ratio"][:6] == pytest.approx([peak * k / 5 for k in (1, 2, 3, 4, 5, 5)])
    assert rates["warmup_steps"][:4] == pytest.approx([peak * k / 3 for k in (1, 2, 3, 3)])
    for name in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        assert rates[name] == rates["base"], name
    assert results["max_length"]["trained_tokens"] <= STEPS * 2 * 24 < results["base"]["trained_tokens"]
    held_back = {
        name: results[name]["num_validation"] for name in ("base", "validation_split", "no validation")
    }
    assert held_back == {"base": 2, "validation_split": 6, "no validation": 0}
    assert results["no validation"]["steps"] == 2 * 6
    for name in ("momentum", "max_grad_norm"):
        assert losses[name] != pytest.approx(losses["optimizer"], rel=1e-4), name
    for name in HYPERPARAMETERS:
        if name not in NOT_IN_THE_STEPS:
            assert losses[name] != pytest.approx(losses["base"], rel=1e-4), name


async def test_the_best_state_is_published_or_the_last(
    redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path
) -> None:
    """At a rate that is far too high, the best state is that before training."""
    world = World(redis, tiny, chat, tmp_path)
    jobs: dict[str, Job] = {}
    async with world.worker():
        for name in ("best", "last"):
            jobs[name] = await trained_too_fast(world, name)

    best, last = (jobs[name].result or {} for name in ("best", "last"))
    assert (best["published"], best["published_step"], best["best_step"]) == ("best", 0, 0)
    assert (last["published"], last["best_step"]) == ("last", 0)
    assert best["finish_reason"] == "early_stop"
    assert last["finish_reason"] == "completed", "without early_stopping, it trains to the end"
    assert last["published_step"] == last["steps"] == STEPS
    assert last["published_valid_loss"] > last["best_valid_loss"] == best["published_valid_loss"]
    assert [warning["code"] for warning in last["warnings"]] == ["no_improvement"]
    norms = {name: await stored_norm(world, name) for name in jobs}
    assert norms["best"] == 0
    assert norms["last"] > 1


async def trained_too_fast(world: World, publish: str) -> Job:
    fast = {**SETTINGS, "learning_rate": 3.0, "publish": publish}
    job = await world.ended(await world.submit(adapter_id=publish, hyperparameters=fast))
    assert job.status is JobStatus.SUCCEEDED, job.error
    return job


async def stored_norm(world: World, name: str) -> float:
    ref = await world.adapters.resolve("acme", name)
    [blob] = await world.adapters.fetch([ref])
    return float(Adapter.of_version(ref, blob).R.float().norm())


@pytest.mark.parametrize(
    ("hyperparameters", "param"),
    [
        ({"optimizer": "sgd"}, "learning_rate"),
        ({"momentum": 0.9}, "momentum"),
        ({**SGD, "adam_beta1": 0.9}, "adam_beta1"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_steps"),
        ({"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"publish": "first"}, "publish"),
        ({"validation_split": 0.95}, "validation_split"),
    ],
)
async def test_a_stored_job_that_makes_no_sense_is_refused(
    redis: Redis,
    tiny: BaseModel,
    chat: ChatFormat,
    tmp_path: Path,
    hyperparameters: dict[str, Any],
    param: str,
) -> None:
    world = World(redis, tiny, chat, tmp_path)
    job_id = await world.submit(hyperparameters=hyperparameters)
    async with world.worker():
        job = await world.ended(job_id)
    assert (job.status, job.attempt) == (JobStatus.FAILED, 1)
    assert job.error is not None
    assert job.error["param"] == f"hyperparameters.{param}"
