"""A worker's pace: the two numbers behind given ticks, and the time of a real job foretold from another."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis

from service.jobs.estimates import expected_seconds
from tessera.chat.chat_format import ChatFormat
from tessera.model.base_model import BaseModel
from tessera.queue.worker_reports import WorkerReports
from tests.trainer_worker.world import World
from tests.waiting import wait_until
from trainer_worker.common.pace import Pace
from trainer_worker.training.run import TokenCounts


def test_steps_and_tokens_are_told_apart() -> None:
    pace, generator = Pace(), random.Random(0)
    assert pace.report(1).step_s is None
    pace.note_tick(TokenCounts(train=100), 99.0)  # a first pass warms up
    pace.note_tick(TokenCounts(train=100), 99.0)
    for _ in range(300):
        train, evaluated = generator.randint(100, 900), generator.choice([0, 0, 0, 600])
        padding = (train + evaluated) // 5
        useful = (train + evaluated / 3) * 1.2
        pace.note_tick(
            TokenCounts(train, evaluated, padding), 0.05 + 1e-4 * useful * generator.uniform(0.9, 1.1)
        )
    report = pace.report(2)
    assert report.step_s == pytest.approx(0.05, rel=0.2)
    assert report.token_s == pytest.approx(1e-4, rel=0.1)
    assert report.padding == pytest.approx(0.2, abs=0.01)
    assert (report.free_slots, report.load, report.fixed_s) == (2, 1.0, None)


def test_ticks_of_one_size_say_what_a_token_costs() -> None:
    pace = Pace()
    for _ in range(50):
        pace.note_tick(TokenCounts(train=200), 0.4)
    report = pace.report(0)
    assert (report.step_s, report.token_s) == (0.0, pytest.approx(2e-3))


def test_jobs_say_what_is_added_to_the_training_alone() -> None:
    pace = Pace()
    for load in (9.0, 1.0, 1.4):
        pace.note_job(fixed_s=2 * load, training_s=10 * load, alone_s=10.0)
    pace.note_job(fixed_s=2.8, training_s=5.0, alone_s=None)
    assert (pace.report(0).load, pace.report(0).fixed_s) == (1.4, 2.8)


async def test_a_second_job_takes_as_long_as_the_first_has_foretold(
    redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path
) -> None:
    """Within a factor of 3, because the machine may be as busy as it likes. The first of all jobs builds the
    basis, which the others find."""
    world = World(redis, tiny, chat, tmp_path)
    async with world.worker(learning_rate_search=False):
        for name in ("devil", "again"):
            whole = {"epochs": 3, "early_stopping": {"patience": None}, "adapter_id": name}
            first = await world.ended(await world.submit(lines=20, **whole))
        assert first.finished_at is not None
        ended_at = first.finished_at

        async def is_reported() -> bool:
            age_s = time.time() - ended_at
            return any(
                report.fixed_s is not None and report.age_s <= age_s
                for report in await WorkerReports(redis).read()
            )

        await wait_until(is_reported)
        reports = await WorkerReports(redis).read()
        second = await world.ended(
            await world.submit("jargon", lines=40, epochs=4, early_stopping={"patience": None})
        )
    assert second.result is not None
    assert second.started_at is not None
    assert second.finished_at is not None
    data = second.result["data"]
    told_s = expected_seconds(
        reports,
        steps=second.result["steps"],
        train_tokens=second.result["trained_tokens"],
        eval_tokens=9 * data["train_tokens"] * data["num_validation"] // data["num_train"],
    )
    assert told_s is not None
    actual_s = second.finished_at - second.started_at
    assert actual_s / 3 < told_s < actual_s * 3, (told_s, actual_s)
