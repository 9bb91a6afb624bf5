"""What a job says about its modules and its scale reaches the training, in both forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.model.base_model import BaseModel
from tessera.queue.client import JobStatus
from tessera.store.bases import BasisStore
from tests.trainer_worker.world import World

SETTINGS: dict[str, Any] = {"n_epochs": 1, "batch_size": 2, "learning_rate": 1e-3}
#: Fields of a job's specification, and how many modules of the bundled model they train.
CHANGES: dict[str, tuple[dict[str, Any], int]] = {
    "base": ({}, 42),
    "scale of 1": ({"scale": 1.0}, 42),
    "alpha of r": ({"alpha": 8}, 42),
    "scale": ({"scale": 4.0}, 42),
    "alpha": ({"alpha": 32}, 42),
    "use_rslora": ({"use_rslora": True, "alpha": 128**0.5}, 42),
    "use_rslora alone": ({"use_rslora": True}, 42),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\..*": 12}}, 42),
    "rank_pattern and alpha": ({"rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\..*": 12}, "alpha": 32}, 42),
    "rank_pattern without effect": ({"rank_pattern": {".*": 8}}, 42),
    "names": ({"target_modules": ["q_proj", "v_proj"]}, 12),
    "wildcards": ({"target_modules": ["*.mlp.*"]}, 18),
    "whole names": ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, 1),
    "all-linear": ({"target_modules": ["all-linear"]}, 42),
}
#: Pairs that mean the same.
SAME = (
    ("scale of 1", "base"),
    ("alpha of r", "base"),
    ("alpha", "scale"),
    ("use_rslora", "scale"),
    ("all-linear", "base"),
    ("rank_pattern without effect", "base"),
)


@pytest.mark.parametrize("form", [{}, {"form": "lora", "method": "lora"}], ids=["core", "lora"])
async def test_each_changes_the_training(
    redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path, form: dict[str, Any]
) -> None:
    world = World(redis, tiny, chat, tmp_path)
    jobs = {
        name: await world.submit(adapter_id=f"a{index}", hyperparameters=SETTINGS, **change, **form)
        for index, (name, (change, _)) in enumerate(CHANGES.items())
    }
    losses: dict[str, float] = {}
    async with world.worker():
        for name, job_id in jobs.items():
            job = await world.ended(job_id, timeout_s=300)
            assert job.status is JobStatus.SUCCEEDED, (name, job.error)
            assert job.result is not None
            manifest = await BasisStore(world.redis).manifest(job.result["basis_id"])
            assert len(manifest.modules) == CHANGES[name][1], name
            losses[name] = job.result["final_train_loss"]
            assert job.result["steps"] > 0, name

    for name in CHANGES:
        same = dict(SAME).get(name)
        if same is not None:
            assert losses[name] == pytest.approx(losses[same], rel=1e-4), name
    distinct = [name for name in CHANGES if name not in dict(SAME)]
    for name in distinct:
        others = [losses[other] for other in distinct if other != name]
        assert all(losses[name] != pytest.approx(other, rel=1e-5) for other in others), name
