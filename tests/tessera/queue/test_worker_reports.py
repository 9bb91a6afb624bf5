"""The reports of workers on a real server: age by its clock, strange reports, old ones."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from tessera.queue.worker_reports import WorkerReport, WorkerReports
from tessera.redis import keys


async def test_a_report_reads_back_with_its_age(redis: Redis) -> None:
    reports = WorkerReports(redis)
    assert await reports.read() == []
    report = WorkerReport(free_slots=3, step_s=0.1, token_s=1e-4, padding=0.2, fixed_s=2.0, load=1.5)
    await reports.post("w1", report)
    await reports.post("w1", report)
    await reports.post("w2", WorkerReport())
    first, second = sorted(await reports.read(), key=lambda found: -found.free_slots)
    assert (first.free_slots, first.step_s, first.load, second.step_s) == (3, 0.1, 1.5, None)
    assert 0 <= first.age_s < 10
    assert first.is_alive

    await redis.hset(keys.QUEUE_WORKERS, "w1", b"1000 {}")
    await redis.hset(keys.QUEUE_WORKERS, "w3", b"what is this")
    dead = [found for found in await reports.read() if not found.is_alive]
    assert len(dead) == 1
    await reports.post("w2", WorkerReport(free_slots=1))
    assert await redis.hkeys(keys.QUEUE_WORKERS) == [b"w2"]


async def test_fields_of_a_newer_release_are_ignored(redis: Redis) -> None:
    reports = WorkerReports(redis)
    await reports.post("w", WorkerReport(free_slots=2))
    [(name, value)] = (await redis.hgetall(keys.QUEUE_WORKERS)).items()
    await redis.hset(keys.QUEUE_WORKERS, name, value[:-1] + b', "new": 1}')
    assert [found.free_slots for found in await reports.read()] == [2]


def test_the_time_of_a_job_follows_from_steps_and_tokens() -> None:
    report = WorkerReport(step_s=0.5, token_s=0.01, padding=0.5)
    assert report.training_seconds(steps=10, train_tokens=100, eval_tokens=30) == pytest.approx(
        5 + 110 * 1.5 / 100
    )
    assert WorkerReport().training_seconds(steps=10, train_tokens=100, eval_tokens=30) is None
