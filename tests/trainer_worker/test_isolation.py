"""A job that kills its worker costs the other jobs of that worker one attempt and no more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from torch import nn

from tessera.chat.chat_format import ChatFormat
from tessera.model.base_model import BaseModel
from tessera.queue.client import JobStatus
from tessera.queue.leases import JobLeases
from tests.job_checks import check_queue, expire_lease, make_due
from tests.trainer_worker.world import TENANT, World, messages
from tests.waiting import wait_until
from trainer_worker.common.waits import Command
from trainer_worker.worker import EXIT_FAILED

#: A character that only the poisonous job contains.
POISON = "§"


@pytest.fixture
def world(redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path) -> World:
    return World(redis, tiny, chat, tmp_path)


@contextmanager
def poisonous(world: World, is_deadly: Callable[[], bool]) -> Iterator[None]:
    """Within the block, a batch that contains the poison breaks the step like a device error."""
    [*_, poison] = world.chat.tokenizer(POISON, add_special_tokens=False)["input_ids"]

    def check(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if is_deadly() and bool((given["input_ids"] == poison).any()):
            raise RuntimeError("CUDA error: an illegal memory access")

    handle = world.base.model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


async def test_a_job_that_breaks_the_step_costs_the_one_beside_it_one_attempt(world: World) -> None:
    lines = [json.dumps({"prompt": f"{POISON} {n}", "completion": "yes"}) for n in range(12)]
    long = {"early_stopping": {"patience": None}}
    file_id = await world.upload("\n".join(lines).encode())
    bad = await world.submit(adapter_id="bad", epochs=50, training_file=file_id, **long)
    good = await world.submit(adapter_id="good", epochs=10, **long)
    together = world.make_worker()
    with poisonous(world, lambda: together._services.loop._pool.num_runs > 1):
        assert await asyncio.wait_for(together.run(), 100) == EXIT_FAILED
    for job_id in (bad, good):
        job = await world.job(job_id)
        assert (job.status, job.attempt, job.num_lost_workers) == (JobStatus.QUEUED, 1, 1)
    await world.queue.pause(TENANT, bad)  # so that the other one is claimed first

    async with world.worker():
        assert (await world.ended(good)).status is JobStatus.SUCCEEDED
    await world.queue.resume(TENANT, bad)
    with poisonous(world, lambda: True):
        assert await asyncio.wait_for(world.make_worker().run(), 100) == EXIT_FAILED
        await make_due(world.redis, bad)
        assert await asyncio.wait_for(world.make_worker().run(), 100) == EXIT_FAILED

    assert (await world.job(good)).attempt == 2
    lost = await world.job(bad)
    assert (lost.status, lost.attempt) == (JobStatus.FAILED, 3)
    assert lost.error is not None
    assert "illegal memory access" in lost.error["message"]
    await check_queue(world.redis)


async def test_a_broken_step_counts_also_where_the_worker_ends_before_the_session_looks(world: World) -> None:
    """Otherwise a job that breaks workers could be released as intact, and break the next worker."""
    job_id = await world.submit(epochs=50, early_stopping={"patience": None})
    worker = world.make_worker()
    running = asyncio.create_task(worker.run())
    await world.under_way(job_id)
    [session] = worker.sessions
    session.commands.give(Command.RELEASE)
    session._on_news(RuntimeError("CUDA error: an illegal memory access"))
    assert await asyncio.wait_for(running, 100) == EXIT_FAILED
    job = await world.job(job_id)
    assert (job.status, job.attempt, job.num_lost_workers) == (JobStatus.QUEUED, 1, 1)
    await check_queue(world.redis)


async def test_a_job_that_lost_a_worker_has_the_next_one_for_itself(world: World) -> None:
    """The other jobs wait until it has ended, however many the worker could hold."""
    suspect = await world.submit(adapter_id="suspect", epochs=1)
    [lease] = await JobLeases(world.redis).claim("dead", limit=1, lease_s=60)
    long = await world.submit(adapter_id="long", lines=40, epochs=50, early_stopping={"patience": None})
    late = await world.submit(adapter_id="late", epochs=1)
    async with world.worker(max_resident_jobs=3, reap_every_s=0.2) as worker:
        await world.under_way(long)
        await world.ended(late)
        await expire_lease(world.redis, lease.job.job_id)

        async def is_waiting() -> list[str]:
            return messages(await world.events(suspect), "waits to have one for itself")

        await wait_until(is_waiting, 60)
        assert (await world.job(suspect)).num_lost_workers == 1
        third = await world.submit(adapter_id="third", epochs=1)
        steps = world.steps_made()
        await wait_until(lambda: world.steps_made() > steps)
        assert len(worker.sessions) == 2
        assert "step" not in (await world.job(suspect)).progress
        assert (await world.job(third)).status is JobStatus.QUEUED
        await world.queue.cancel(TENANT, long)
        assert (await world.ended(suspect)).status is JobStatus.SUCCEEDED
        assert (await world.ended(third)).status is JobStatus.SUCCEEDED
    began = {job: (await world.events(job))[-1].created_at for job in (suspect, third)}
    assert began[suspect] <= began[third]
    await check_queue(world.redis)


async def test_a_job_that_waits_alone_can_be_cancelled(world: World) -> None:
    suspect = await world.submit(adapter_id="suspect", epochs=1)
    [lease] = await JobLeases(world.redis).claim("dead", limit=1, lease_s=60)
    long = await world.submit(adapter_id="long", lines=40, epochs=50, early_stopping={"patience": None})
    async with world.worker(max_resident_jobs=3, reap_every_s=0.2):
        await world.under_way(long)
        await expire_lease(world.redis, lease.job.job_id)

        async def is_claimed() -> bool:
            return (await world.job(suspect)).attempt == 2

        await wait_until(is_claimed, 60)
        await world.queue.cancel(TENANT, suspect)
        assert (await world.ended(suspect)).status is JobStatus.CANCELLED
        await world.queue.cancel(TENANT, long)
        await world.ended(long)
    await check_queue(world.redis)
