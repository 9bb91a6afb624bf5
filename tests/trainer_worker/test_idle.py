"""A worker before its first job holds no model, does its duties, and loads the model when a job waits."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from tessera.processes.child_process import start_child
from tessera.queue.client import JobQueue, JobSpec, JobStatus
from tessera.queue.leases import JobLeases
from tessera.queue.worker_reports import WorkerReports
from tessera.store.files import FileStore
from tests.trainer_worker.conftest import DATA
from tests.waiting import HANG_S, wait_until
from trainer_worker.common.duties import Heartbeat
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.idle import IdleWorker
from trainer_worker.settings import WorkerSettings

TENANT = "acme"
SPEC = {"adapter_id": "devil", "base_model": "tiny", "rank": 8}


@pytest.fixture
def queue(redis: Redis) -> Iterator[JobQueue]:
    return JobQueue(redis)


def make_idle(redis: Redis) -> IdleWorker:
    settings = WorkerSettings(reap_every_s=0.05, lease_s=1)
    return IdleWorker(
        JobLeases(redis),
        settings,
        metrics=TrainerMetrics(),
        heartbeat=Heartbeat(),
        reports=WorkerReports(redis),
    )


async def test_it_waits_until_a_job_can_be_claimed_and_leaves_it_to_the_worker(
    redis: Redis, queue: JobQueue
) -> None:
    waiting = asyncio.create_task(make_idle(redis).wait_for_first_job())
    await asyncio.sleep(0.2)
    assert not waiting.done()
    job = await queue.submit(TENANT, JobSpec(training_file="file-1", **SPEC), cost=1)
    assert await asyncio.wait_for(waiting, HANG_S)
    assert (await queue.get(TENANT, job.job_id)).status is JobStatus.QUEUED


async def test_it_stops_at_once(redis: Redis) -> None:
    idle = make_idle(redis)
    waiting = asyncio.create_task(idle.wait_for_first_job())
    await asyncio.sleep(0.1)
    idle.stop()
    assert not await asyncio.wait_for(waiting, HANG_S)


async def test_it_finds_the_job_of_a_worker_that_died(redis: Redis, queue: JobQueue) -> None:
    job = await queue.submit(TENANT, JobSpec(training_file="file-1", **SPEC), cost=1)
    [lease] = await JobLeases(redis).claim("dead", limit=1, lease_s=1)
    assert lease.job.job_id == job.job_id
    assert await asyncio.wait_for(make_idle(redis).wait_for_first_job(), HANG_S)
    assert (await queue.get(TENANT, job.job_id)).status is JobStatus.QUEUED


async def test_the_process_loads_torch_for_its_first_job(
    redis: Redis, redis_url: str, queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "STORE_URL": redis_url, "DATA_DIR": str(tmp_path), "WORKER_METRICS_PORT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"TESSERA_{name}", value)
    with (tmp_path / "log").open("wb") as log:
        process = start_child([sys.executable, "-m", "trainer_worker"], output=log)
    try:

        async def is_idle() -> bool:
            return b"idle" in (tmp_path / "log").read_bytes()

        await wait_until(is_idle, HANG_S)
        found = psutil.Process(process.pid)
        assert not any("torch" in file.path for file in found.memory_maps())
        assert found.memory_info().rss < 120e6

        content = b"\n".join((DATA / "devil.jsonl").read_bytes().split(b"\n")[:4])
        file = await FileStore(redis).put(TENANT, filename="d.jsonl", purpose="fine-tune", content=content)
        spec = JobSpec(training_file=file.file_id, hyperparameters={"n_epochs": 1}, **SPEC)
        job_id = (await queue.submit(TENANT, spec, cost=1)).job_id

        async def has_ended() -> bool:
            return (await queue.get(TENANT, job_id)).status.is_final

        await wait_until(has_ended, HANG_S)
        assert (await queue.get(TENANT, job_id)).status is JobStatus.SUCCEEDED
        assert any("torch" in file.path for file in found.memory_maps())
        process.terminate()
        assert process.wait(HANG_S) == 0
    finally:
        process.kill()
        process.wait()


async def test_the_waiting_ends_although_a_duty_loses_its_cancellation(redis: Redis, queue: JobQueue) -> None:
    """As redis-py may: `end_tasks` says why."""

    class Deaf(JobLeases):
        num_cancelled = 0

        async def reap(self, *, grace_s: float) -> dict[str, JobStatus]:
            try:
                await asyncio.sleep(HANG_S)
            except asyncio.CancelledError:
                self.num_cancelled += 1
                if self.num_cancelled > 1:
                    raise
            return {}

    leases = Deaf(redis)
    settings = WorkerSettings(reap_every_s=0.01)
    reports = WorkerReports(redis)
    idle = IdleWorker(leases, settings, metrics=TrainerMetrics(), heartbeat=Heartbeat(), reports=reports)
    waiting = asyncio.create_task(idle.wait_for_first_job())
    await asyncio.sleep(0.2)
    await queue.submit(TENANT, JobSpec(training_file="file-1", **SPEC), cost=1)
    assert await asyncio.wait_for(waiting, HANG_S)
