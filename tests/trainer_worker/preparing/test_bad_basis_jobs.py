"""Jobs of `POST /v1/bases` that only a worker can refuse: the error names what is wrong.

What is wrong in the request itself is refused before a job is queued:
tests/service/http/routes/test_bases.py.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis
from torch import nn

from tessera.chat.chat_format import ChatFormat
from tessera.model.base_model import BaseModel
from tessera.queue.client import Job, JobQueue, JobSpec, JobStatus
from tessera.store.bases import BasisStore
from tessera.store.ownership import PrivateBases
from tests.trainer_worker.conftest import DATA
from tests.trainer_worker.world import TENANT, World
from tests.waiting import wait_until

TARGETS = ["*.layers.0.*.down_proj", "*.layers.1.*.down_proj"]


async def refused(world: World, content: bytes, *, method: str = "lora_sb", rank: int = 4) -> str:
    """Run a job on these data, which fails at its first attempt without a basis; returns the message."""
    queue = JobQueue(world.redis, kind="basis")
    spec = JobSpec(
        kind="basis", base_model="tiny", method=method, rank=rank, target_modules=TARGETS,
        calibration=await world.upload(content),
    )  # fmt: skip
    job_id = (await queue.submit(TENANT, spec, cost=1)).job_id

    async def final() -> Job | None:
        job = await queue.get(TENANT, job_id)
        return job if job.status.is_final else None

    async with world.worker(max_resident_jobs=1):
        job = await wait_until(final, 60)
    assert (job.status, job.attempt) == (JobStatus.FAILED, 1)
    assert await PrivateBases(world.redis, max_bytes=2**40).of_tenant(TENANT) == {}
    assert await BasisStore(world.redis).list() == []
    assert job.error is not None
    return str(job.error["message"])


@pytest.fixture
def broken(redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path) -> World:
    """A world with a base model of its own."""
    base = BaseModel(tiny.name, tiny.model_id, copy.deepcopy(tiny.model))
    return World(redis, base, chat, tmp_path)


def some_lines() -> bytes:
    return b"\n".join((DATA / "jargon.jsonl").read_bytes().split(b"\n")[:6])


@pytest.mark.parametrize("method", ["lora_sb", "lora_da", "eva", "population"])
async def test_too_little_data_for_the_rank(broken: World, method: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    line = json.dumps({"messages": messages}).encode()

    message = await refused(broken, line, method=method, rank=64)

    assert "tokens, too few for rank 64" in message


@pytest.mark.parametrize("method", ["lora_sb", "lora_da"])
async def test_gradients_that_are_not_finite(broken: World, method: str) -> None:
    broken.base.model.model.norm.weight.data[0] = float("nan")

    assert "is nan" in await refused(broken, some_lines(), method=method)


async def test_a_quantised_weight(broken: World) -> None:
    linear = broken.base.model.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)

    message = await refused(broken, some_lines())

    # A training worker has replaced layers of the model, so the class has another name.
    assert re.search(r"model.layers.1.mlp.down_proj is a \w*Linear with torch.int8 weights", message)


async def test_a_tied_weight(broken: World) -> None:
    layers = broken.base.model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight

    message = await refused(broken, some_lines())

    assert "model.layers.0.mlp.down_proj is tied to model.layers.1.mlp.down_proj" in message
