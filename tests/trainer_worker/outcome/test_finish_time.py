"""The time that a run still needs: the rule with a clock of the test's own, and real runs of a worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.model.base_model import BaseModel
from tessera.queue.client import JobStatus
from tests.trainer_worker.conftest import MakeRun
from tests.trainer_worker.world import World
from tests.waiting import wait_until
from trainer_worker.outcome.finish_time import FinishTime, PublishTime
from trainer_worker.training.run import RunUpdate


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def step(finish: FinishTime, clock: Clock, seconds: float, *, is_evaluated: bool = False) -> None:
    """A step of this length, after an evaluation or not, as trainers report it."""
    clock.now_s += seconds
    if is_evaluated:
        finish.note(RunUpdate("a", valid_loss=1.0))
    finish.note(RunUpdate("a", learning_rate=1e-3, train_loss=1.0))


def test_steps_evaluations_and_the_publication_are_counted(make_run: MakeRun) -> None:
    clock, publishing = Clock(), PublishTime()
    publishing.note(5.0)
    run, finish = make_run("a", total_steps=40, evaluate_every=10), FinishTime(publishing, clock)
    finish.begin()
    step(finish, clock, 3.0, is_evaluated=True)
    run.progress.step = 1
    assert finish.remaining_s(run) is None, "one step with an evaluation says nothing about the others"
    for _ in range(9):
        step(finish, clock, 1.0)
    run.progress.step = 10
    # 30 steps, the evaluations after steps 10, 20, 30 and 40 at 2 s more than a step each, and publishing
    assert finish.remaining_s(run) == pytest.approx(30 + 4 * 2 + 5)
    step(finish, clock, 3.0, is_evaluated=True)
    run.progress.step = 11
    assert finish.remaining_s(run) == pytest.approx(29 + 3 * 2 + 5)
    run.progress.finish_reason = "early_stop"
    assert finish.remaining_s(run) == pytest.approx(5)


def test_one_long_wait_does_not_count_and_a_slower_pace_does(make_run: MakeRun) -> None:
    clock = Clock()
    run, finish = make_run("a", total_steps=100, evaluate_every=1000), FinishTime(PublishTime(), clock)
    finish.begin()
    for seconds in (1.0, 1.0, 60.0, 1.0, 1.0):
        step(finish, clock, seconds)
    run.progress.step = 5
    assert finish.remaining_s(run) == pytest.approx(95)
    for _ in range(30):
        step(finish, clock, 2.0)
    run.progress.step = 35
    assert finish.remaining_s(run) == pytest.approx(2 * 65)


async def test_the_estimates_of_a_real_run_are_close_and_known_early(
    redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path
) -> None:
    """Every estimate after a fifth of the run misses the end by less than half of what was left, and 2 s.

    The bound is wide because the machine need not be quiet.
    """
    world = World(redis, tiny, chat, tmp_path)
    job_id = await world.submit(lines=24, epochs=6, early_stopping={"patience": None})
    estimates: dict[int, tuple[float, float]] = {}

    async def has_ended() -> bool:
        job = await world.job(job_id)
        progress = job.progress
        if (
            job.progress_at is not None
            and progress.get("remaining_s") is not None
            and not job.status.is_final
        ):
            estimates.setdefault(int(progress["step"]), (job.progress_at, float(progress["remaining_s"])))
        return job.status.is_final

    async with world.worker(learning_rate_search=False):
        await wait_until(has_ended)
    job = await world.job(job_id)
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert job.finished_at is not None
    assert (job.progress["percent"], job.progress["phase"]) == (100.0, "finished")
    total = job.progress["total_steps"]
    assert min(estimates) <= total / 5, "an estimate is known after a fifth of the steps"
    late = {step: found for step, found in estimates.items() if step > total / 5}
    assert len(late) >= 5
    for step, (at, remaining_s) in late.items():
        actual_s = job.finished_at - at
        assert abs(remaining_s - actual_s) < 0.5 * actual_s + 2, (step, remaining_s, actual_s)
