"""Jobs that their owners end early and keep: what is published, and when there is nothing to keep."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.errors import Conflict
from tessera.model.base_model import BaseModel
from tessera.queue.client import JobStatus
from tests.job_checks import check_queue
from tests.trainer_worker.world import TENANT, World, messages
from tests.waiting import wait_until


@pytest.fixture
def world(redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path) -> World:
    return World(redis, tiny, chat, tmp_path)


async def test_a_stopped_job_publishes_its_best_state(world: World) -> None:
    job_id = await world.submit(epochs=50, early_stopping={"patience": None})
    with pytest.raises(Conflict, match="before its first step") as caught:
        await world.queue.stop(TENANT, job_id)
    assert caught.value.code == "job_not_stoppable"
    async with world.worker():
        await world.under_way(job_id, step=6)
        assert (await world.queue.stop(TENANT, job_id)).stop_requested
        job = await world.ended(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.result is not None
    assert job.result["finish_reason"] == "stopped"
    assert 6 <= job.result["steps"] < job.progress["total_steps"] == 250
    assert job.result["best_valid_loss"] < job.result["initial_valid_loss"]
    assert job.progress["percent"] == 100
    version = (await world.adapters.get(TENANT, "devil")).versions[0]
    assert version.metadata["step"] == job.result["best_step"]
    assert messages(await world.events(job_id), "Stop requested")
    with pytest.raises(Conflict, match="it is succeeded"):
        await world.queue.stop(TENANT, job_id)
    await check_queue(world.redis)


async def test_a_paused_job_can_be_stopped_and_another_worker_publishes_it(world: World) -> None:
    job_id = await world.submit(epochs=50)

    async def is_paused() -> bool:
        return (await world.job(job_id)).status is JobStatus.PAUSED

    async with world.worker():
        await world.under_way(job_id, step=3)
        await world.queue.pause(TENANT, job_id)
        await wait_until(is_paused)
    steps = int((await world.job(job_id)).progress["step"])
    assert (await world.queue.stop(TENANT, job_id)).status is JobStatus.QUEUED
    async with world.worker():
        job = await world.ended(job_id)
    assert job.result is not None
    assert job.result["finish_reason"] == "stopped"
    assert steps <= job.result["steps"] <= steps + 2
    await check_queue(world.redis)


async def test_a_cancellation_wins_over_a_stop(world: World) -> None:
    job_id = await world.submit(epochs=50)
    async with world.worker():
        await world.under_way(job_id)
        await world.queue.cancel(TENANT, job_id)
        with pytest.raises(Conflict, match="cancelled"):  # being so, or already
            await world.queue.stop(TENANT, job_id)
        assert (await world.ended(job_id)).status is JobStatus.CANCELLED
    assert await world.adapters.count() == 0


async def test_the_chosen_hyperparameters_and_the_log_tell_where_a_job_stands(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trainer_worker.reporter")
    job_id = await world.submit(lines=20, epochs=2, hyperparameters={"learning_rate_multiplier": 0.5})
    async with world.worker(log_every_s=0, learning_rate_search=False):
        job = await world.ended(job_id)
    chosen = job.progress["hyperparameters"]
    assert job.result is not None
    assert chosen["learning_rate"] == job.result["learning_rate"]
    assert chosen["learning_rate_multiplier"] == 0.5
    assert (chosen["batch_size"], chosen["n_epochs"]) == (2, job.progress["num_epochs"])
    assert chosen["max_length"] == 1024
    [*_, last] = [record for record in caplog.records if record.name == "trainer_worker.reporter"]
    assert f"job {job_id}: Step {job.result['steps']}/" in last.getMessage()
    assert last.fields["valid_loss"] == pytest.approx(job.result["best_valid_loss"], abs=1)
    assert last.fields["total_steps"] == job.progress["total_steps"]
