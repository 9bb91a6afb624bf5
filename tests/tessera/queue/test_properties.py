"""The training queue against a model: any order of any steps, by clients, workers, stale workers and time.

The model is a dict of what each job must be. After every step the real queue (on a real server) agrees with
it field by field, every job stands in exactly one place, and only running jobs have a live lease. At the end
everything is driven to its end: no job is lost, and each has ended exactly once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from tessera.errors import Conflict, StaleLease
from tessera.queue.client import JobQueue
from tessera.queue.leases import JobLeases, Lease, LeaseState
from tessera.queue.records import Job
from tessera.redis.client import connect
from tests.job_checks import check_queue, expire_lease, make_due, make_spec

MAX_ATTEMPTS = 3
MAX_RUNNING_JOBS = 2
TENANTS = ["a", "b"]
MAX_JOBS = 6  # few, so that steps meet on the same job
ENDINGS = {"Job succeeded", "Job cancelled", "Job failed"}

STEPS = ["complete", "fail", "retry", "release", "acknowledge", "report"]


@dataclass
class ModelJob:
    tenant: str
    order: int
    cost: int
    status: str = "queued"
    is_delayed: bool = False
    attempt: int = 0
    epoch: int = 0
    cancel: bool = False
    pause: bool = False
    leases: list[Lease] = field(default_factory=list)

    def back(self, *, is_delayed: bool = False) -> None:
        """Take the job from its worker to where its owner wants it."""
        if self.cancel:
            self.end("cancelled")
        elif self.pause:
            self.status, self.is_delayed, self.pause = "paused", is_delayed, False
        else:
            self.status, self.is_delayed = "queued", is_delayed

    def end(self, status: str) -> None:
        self.status, self.is_delayed, self.cancel, self.pause = status, False, False, False

    @property
    def is_final(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")


class QueueMachine(RuleBasedStateMachine):
    redis_url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.jobs: dict[str, ModelJob] = {}
        self.dedupe: dict[tuple[str, int], str] = {}

    def do(self, call: Awaitable[Any]) -> Any:
        async def run() -> Any:
            return await call

        return self.runner.run(run())

    @initialize()
    def connect(self) -> None:
        async def prepare() -> Redis:
            client = connect(self.redis_url)
            await client.flushall()
            return client

        self.redis = self.do(prepare())
        self.queue = JobQueue(self.redis)
        self.workers = JobLeases(
            self.redis, max_attempts=MAX_ATTEMPTS, retry_base_s=3600, max_running_jobs=MAX_RUNNING_JOBS
        )

    def given(self) -> list[tuple[Lease, ModelJob]]:
        """Return every lease that was ever given, with its job."""
        return [(lease, job) for job in self.jobs.values() for lease in job.leases]

    def having(self, status: str) -> list[str]:
        return [job_id for job_id, job in self.jobs.items() if job.status == status]

    # Clients

    @precondition(lambda self: len(self.jobs) < MAX_JOBS)
    @rule(
        tenant=st.sampled_from(TENANTS),
        cost=st.integers(0, 5000),
        dedupe=st.one_of(st.none(), st.integers(0, 2)),
        is_delayed=st.booleans(),
    )
    def submit(self, tenant: str, cost: int, dedupe: int | None, is_delayed: bool) -> None:
        job: Job = self.do(
            self.queue.submit(
                tenant,
                make_spec(),
                cost=cost,
                dedupe_key=None if dedupe is None else str(dedupe),
                not_before=time.time() + 3600 if is_delayed else None,
            )
        )
        if dedupe is not None and (tenant, dedupe) in self.dedupe:
            assert job.job_id == self.dedupe[tenant, dedupe]
            return
        assert job.job_id not in self.jobs
        self.jobs[job.job_id] = ModelJob(tenant, len(self.jobs), max(1, cost), is_delayed=is_delayed)
        if dedupe is not None:
            self.dedupe[tenant, dedupe] = job.job_id

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), command=st.sampled_from(["cancel", "pause", "resume"]))
    def command(self, data: st.DataObject, command: str) -> None:
        job_id, job = data.draw(st.sampled_from(list(self.jobs.items())))
        call = getattr(self.queue, command)(job.tenant, job_id)
        if job.is_final or (command == "pause" and job.cancel):
            with pytest.raises(Conflict):
                self.do(call)
            return
        self.do(call)
        if job.status == "running":
            job.cancel = job.cancel or command == "cancel"
            job.pause = {"pause": True, "resume": False}.get(command, job.pause)
        elif command == "cancel":
            job.end("cancelled")
        else:
            job.status = "paused" if command == "pause" else "queued"

    # Workers

    @rule(limit=st.integers(0, 4), worker=st.sampled_from(["w1", "w2"]))
    def claim(self, limit: int, worker: str) -> None:
        leases: list[Lease] = self.do(self.workers.claim(worker, limit=limit, lease_s=3600))
        for lease in leases:
            job = self.jobs[lease.job.job_id]
            oldest = min((j for j in self.claimable() if j.tenant == job.tenant), key=lambda j: j.order)
            assert job is oldest, "each tenant's jobs run in the order of submission"
            assert self.running(job.tenant) < MAX_RUNNING_JOBS
            job.status, job.attempt, job.epoch = "running", job.attempt + 1, job.epoch + 1
            job.leases.append(lease)
            assert (lease.epoch, lease.job.attempt) == (job.epoch, job.attempt)
        if len(leases) < limit:
            assert all(self.running(job.tenant) == MAX_RUNNING_JOBS for job in self.claimable())

    def claimable(self) -> list[ModelJob]:
        return [job for job in self.jobs.values() if job.status == "queued" and not job.is_delayed]

    def running(self, tenant: str) -> int:
        return sum(job.tenant == tenant and job.status == "running" for job in self.jobs.values())

    @precondition(lambda self: self.given())
    @rule(data=st.data(), step=st.sampled_from(STEPS))
    def work(self, data: st.DataObject, step: str) -> None:
        lease, job = data.draw(st.sampled_from(self.given()))
        is_alive = job.status == "running" and lease.epoch == job.epoch
        problem = {"code": "x", "message": "y"}
        call = {
            "complete": lambda: self.workers.complete(lease, {"epoch": lease.epoch}),
            "fail": lambda: self.workers.fail(lease, problem, retryable=False),
            "retry": lambda: self.workers.fail(lease, problem, retryable=True),
            "release": lambda: self.workers.release(lease),
            "acknowledge": lambda: self.workers.acknowledge_cancel(lease),
            "report": lambda: self.workers.report(lease, message="step", progress={"epoch": lease.epoch}),
        }[step]()
        if step == "complete" and job.status == "succeeded" and lease.epoch == job.epoch:
            self.do(call)  # the same completion again
        elif not is_alive:
            with pytest.raises(StaleLease):
                self.do(call)
        elif step == "acknowledge" and not job.cancel:
            with pytest.raises(Conflict, match="nobody cancelled"):
                self.do(call)
        else:
            self.do(call)
            self.after(job, step)

    @staticmethod
    def after(job: ModelJob, step: str) -> None:
        if step == "complete":
            job.end("succeeded")
        elif step == "fail" or (step == "retry" and job.attempt == MAX_ATTEMPTS and not job.cancel):
            job.end("failed")
        elif step == "release":
            job.attempt -= 1
            job.back()
        elif step in ("retry", "acknowledge"):
            job.back(is_delayed=step == "retry")

    @precondition(lambda self: self.given())
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        leases = st.sampled_from(self.given())
        chosen = data.draw(st.lists(leases, unique_by=lambda pair: pair[0].job.job_id))
        states = self.do(self.workers.renew([lease for lease, _ in chosen], lease_s=3600))
        for lease, job in chosen:
            is_alive = job.status == "running" and lease.epoch == job.epoch
            asked = LeaseState.CANCEL if job.cancel else LeaseState.PAUSE if job.pause else LeaseState.HELD
            assert states[lease.job.job_id] is (asked if is_alive else LeaseState.LOST)

    # Time

    @precondition(lambda self: self.having("running"))
    @rule(data=st.data())
    def lose_worker(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.having("running")))
        job = self.jobs[job_id]
        self.do(expire_lease(self.redis, job_id))
        reaped = self.do(self.workers.reap())
        if job.attempt == MAX_ATTEMPTS and not job.cancel:
            job.end("failed")
        else:
            job.back()
        assert reaped == {job_id: job.status}

    @precondition(lambda self: self.delayed())
    @rule(data=st.data(), by_claim=st.booleans())
    def become_due(self, data: st.DataObject, by_claim: bool) -> None:
        job_id = data.draw(st.sampled_from(self.delayed()))
        self.do(make_due(self.redis, job_id))
        self.jobs[job_id].is_delayed = False
        if by_claim:
            self.claim(1, "w1")
        else:
            assert self.do(self.workers.reap()) == {}

    def delayed(self) -> list[str]:
        return [job_id for job_id in self.having("queued") if self.jobs[job_id].is_delayed]

    # What always holds

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.do(check_queue(self.redis))
        for tenant in TENANTS:
            listed, has_more = self.do(self.queue.list(tenant, limit=1000))
            assert not has_more
            newest_first = sorted((j for j in self.jobs if self.jobs[j].tenant == tenant), reverse=True)
            assert [job.job_id for job in listed] == newest_first
            for job in listed:
                self.compare(job, self.jobs[job.job_id])

    @staticmethod
    def compare(job: Job, model: ModelJob) -> None:
        assert job.status == model.status
        assert (job.attempt, job.epoch, job.cost) == (model.attempt, model.epoch, model.cost)
        assert (job.cancel_requested, job.pause_requested) == (model.cancel, model.pause)
        assert (job.finished_at is not None) == model.is_final
        assert (job.result is not None) == (model.status == "succeeded")
        assert (job.error is not None) == (model.status == "failed")
        assert (job.queue_position is not None) == (model.status == "queued" and not model.is_delayed)
        if model.status in ("queued", "paused"):
            assert (job.not_before is not None) == model.is_delayed

    def teardown(self) -> None:
        if hasattr(self, "redis"):
            self.drive_to_the_end()
            self.do(self.redis.aclose())
        self.runner.close()

    def drive_to_the_end(self) -> None:
        for job_id, job in self.jobs.items():
            if job.status == "paused":
                self.do(self.queue.resume(job.tenant, job_id))
            if job.status in ("paused", "queued") and job.is_delayed:
                self.do(make_due(self.redis, job_id))
            if job.status == "running":
                self.do(self.workers.complete(job.leases[-1], {}))
        while leases := self.do(self.workers.claim("last", limit=100, lease_s=3600)):
            for lease in leases:
                self.do(self.workers.complete(lease, {}))
        for job_id, job in self.jobs.items():
            assert self.do(self.queue.get(job.tenant, job_id)).status.is_final, "lost"
            events, _ = self.do(self.queue.events(job.tenant, job_id, limit=1000))
            endings = [event for event in events if event.message.split(":")[0].split(" after")[0] in ENDINGS]
            assert len(endings) == 1
            assert endings == events[:1], "nothing happens after the end"
        self.do(check_queue(self.redis))


def test_any_order_of_steps_agrees_with_the_model(redis_url: str) -> None:
    class Machine(QueueMachine):
        pass

    Machine.redis_url = redis_url
    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=40))
