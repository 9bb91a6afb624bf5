"""One job gets its basis while another job of the tenant releases the same basis, command by command.

Every test runs one job up to its k-th command, lets the other make m commands, and finishes both, for all
possible k and m.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from redis.asyncio import Redis

from tessera.defaults import LLAMA_LINEARS
from tessera.errors import BasisDeleted, Conflict, InvalidInput, NotFound, TesseraError
from tessera.formats.adapter import Adapter
from tessera.formats.manifest import ModuleShape
from tessera.formats.single_adapter import LowRank, SingleAdapter, make_single_adapter
from tessera.model.base_model import BaseModel
from tessera.queue.records import Job, JobSpec, JobStatus
from tessera.redis import keys
from tessera.store.adapters import AdapterStore, AdapterVersion
from tessera.store.bases import BasisStore
from tessera.store.checkpoints import CheckpointStore
from tessera.store.holds import BasisHolds
from tessera.store.ownership import PrivateBases
from tests.stepping import Gate, Stepped, SteppedRedis
from tests.trainer_worker.world import SilentListener
from trainer_worker.common.model_lock import ModelLock
from trainer_worker.outcome.publisher import Publisher
from trainer_worker.preparing.basis_source import Attempt, BasisSource, JobBasis
from trainer_worker.training.run import RunResult

TENANT = "acme"
JOBS = ("ftjob-a", "ftjob-b")
#: One small layer and no data, so that a basis is built quickly; not the default, so the tenant owns it.
SPEC = JobSpec(
    adapter_id="a", training_file="file-1", base_model="tiny", method="lora_xs", rank=2,
    target_modules=["*.layers.0.*.v_proj"],
)  # fmt: skip


class Worker:
    """The parts of a worker that deal with bases. Its commands wait at `gate` if it is gated."""

    def __init__(self, redis: Redis, base: BaseModel, *, max_bytes: int = 2**30, gated: bool = True) -> None:
        self.was_refused = False
        self.gate = Gate()
        self.gate.is_open = not gated
        self.redis = SteppedRedis(redis, self.gate)
        self.own, self.store = PrivateBases(self.redis, max_bytes=max_bytes), BasisStore(self.redis)
        self.holds = BasisHolds(self.redis, self.own)
        adapters = AdapterStore(self.redis)
        self.publisher = Publisher(
            adapters, self.store, self.own, self.holds, dtype=torch.float16, base_model_id=base.model_id,
            checkpoints=CheckpointStore(self.redis), keep_checkpoints=0,
        )  # fmt: skip
        self.source = BasisSource(
            base, ModelLock(base), bases=self.store, own=self.own, holds=self.holds,
            target_modules=LLAMA_LINEARS,
        )  # fmt: skip

    async def get(self, job: Job) -> JobBasis:
        return await self.source.of(Attempt(job, SilentListener()), None)

    async def get_and_end(self, job: Job) -> None:
        await self.get(job)
        await self.holds.let_go(TENANT, job.job_id)

    async def delete(self, basis_id: str) -> None:
        """Delete a basis as the service does, which refuses it while a job needs the basis."""
        try:
            await self.holds.delete(TENANT, basis_id)
        except Conflict:
            self.was_refused = True

    def begin(self, work: Coroutine[Any, Any, Any]) -> Stepped[Any]:
        return Stepped(self.gate, work)


def job_of(name: str, **changes: Any) -> Job:
    return Job(
        job_id=f"ftjob-{name}", tenant=TENANT, spec=replace(SPEC, adapter_id=name, **changes),
        status=JobStatus.RUNNING, created_at=0.0, started_at=0.0, finished_at=None, attempt=1, epoch=1,
        cost=1, progress={}, result=None, error=None, queue_position=None,
    )  # fmt: skip


class Race:
    """Two gated workers, one for the job and one for the other job, and one without a gate."""

    def __init__(self, redis: Redis, base: BaseModel, *, max_bytes: int) -> None:
        self.first = Worker(redis, base, max_bytes=max_bytes)
        self.other = Worker(redis, base, max_bytes=max_bytes)
        self.free = Worker(redis, base, gated=False)

    @classmethod
    async def in_empty_store(cls, redis: Redis, base: BaseModel, *, max_bytes: int = 2**30) -> Race:
        await redis.flushall()
        for name in JOBS:
            await redis.hset(keys.job_record(name), "status", JobStatus.RUNNING.value)
        return cls(redis, base, max_bytes=max_bytes)


Begin = Callable[[Race], Awaitable[tuple[Coroutine[Any, Any, Any], Coroutine[Any, Any, Any]]]]
Check = Callable[[Race, Any], Awaitable[None]]


async def run_all(
    redis: Redis, base: BaseModel, begin: Begin, check: Check, *, max_bytes: int = 2**30
) -> int:
    """Run every interleaving and return their number.

    check: called with the result of the first piece of work, or with the `TesseraError` that it raised.
    """
    num_runs = 0
    for num_other in count(1):
        other_has_more = False
        for num_first in count():
            race = await Race.in_empty_store(redis, base, max_bytes=max_bytes)
            works = await begin(race)
            first, other = race.first.begin(works[0]), race.other.begin(works[1])
            first_has_more = await first.advance(num_first)
            other_has_more |= await other.advance(num_other)
            try:
                outcome = await first.finish()
            except TesseraError as error:
                outcome = error
            await other.finish()
            await check(race, outcome)
            num_runs += 1
            if not first_has_more:
                break
        if not other_has_more:
            return num_runs
    raise AssertionError


async def check_held(race: Race, outcome: Any) -> None:
    """The job has its whole basis, is its only holder, and is charged once; nothing is left when it ends."""
    assert isinstance(outcome, JobBasis), outcome
    basis_id = outcome.basis.basis_id
    assert (await race.free.store.get(basis_id)).basis_id == basis_id
    assert await race.free.own.users(TENANT, basis_id) == {"job:ftjob-b"}
    assert await race.free.own.of_tenant(TENANT) == {basis_id: outcome.basis.manifest.stored_bytes}
    await race.free.holds.let_go(TENANT, "ftjob-b")
    await check_nothing_left(race)


async def check_nothing_left(race: Race) -> None:
    left = {key.decode() async for key in race.free.redis.scan_iter(match="*")}
    assert left - {keys.tenant_recipes(TENANT), *map(keys.job_record, JOBS)} == set()


async def test_a_job_gets_the_basis_that_another_one_is_just_giving_up(redis: Redis, tiny: BaseModel) -> None:
    async def begin(race: Race) -> Any:
        await race.free.get(job_of("a"))
        return race.first.get(job_of("b")), race.other.holds.let_go(TENANT, "ftjob-a")

    assert await run_all(redis, tiny, begin, check_held) > 20


async def test_a_job_gets_the_basis_that_its_owner_is_just_deleting(redis: Redis, tiny: BaseModel) -> None:
    """Unless the job comes first: then the owner gets an error, and the basis stays pinned."""

    async def begin(race: Race) -> Any:
        built = await race.free.get(job_of("a"))
        await race.free.holds.pin(TENANT, built.basis.basis_id)
        await race.free.holds.let_go(TENANT, "ftjob-a")
        return race.first.get(job_of("b")), race.other.delete(built.basis.basis_id)

    async def check(race: Race, outcome: Any) -> None:
        assert isinstance(outcome, JobBasis), outcome
        basis_id = outcome.basis.basis_id
        if race.other.was_refused:
            assert f"pin:{basis_id}" in await race.free.own.users(TENANT, basis_id)
            await race.free.own.release(TENANT, f"pin:{basis_id}", deletion_count=1)
        await check_held(race, outcome)

    assert await run_all(redis, tiny, begin, check) > 20


async def test_two_jobs_build_one_basis_where_there_is_room_for_one(redis: Redis, tiny: BaseModel) -> None:
    """Neither fails because of the other, although one of them ends as soon as it has the basis."""
    built = await Worker(redis, tiny, gated=False).get(job_of("a"))

    async def begin(race: Race) -> Any:
        return race.first.get(job_of("b")), race.other.get_and_end(job_of("a"))

    assert await run_all(redis, tiny, begin, check_held, max_bytes=built.basis.manifest.stored_bytes) > 50


async def test_a_basis_named_by_its_id_is_held_or_gone(redis: Redis, tiny: BaseModel) -> None:
    async def begin(race: Race) -> Any:
        basis_id = (await race.free.get(job_of("a"))).basis.basis_id
        return race.first.get(job_of("b", basis_id=basis_id)), race.other.holds.let_go(TENANT, "ftjob-a")

    async def check(race: Race, outcome: Any) -> None:
        if isinstance(outcome, BasisDeleted | NotFound):
            await check_nothing_left(race)
        else:
            await check_held(race, outcome)

    await run_all(redis, tiny, begin, check)


def trained() -> SingleAdapter:
    shapes = [ModuleShape(f"layers.{i}.q_proj", 8, 8) for i in range(2)]
    changes = {shape: LowRank(torch.eye(2, 8), torch.ones(8, 2)) for shape in shapes}
    return make_single_adapter(changes, model_id="m", method="lora", recipe={}, metadata={})


async def test_a_result_is_published_although_its_twin_is_just_failing(redis: Redis, tiny: BaseModel) -> None:
    """Two LoRA jobs have the same result. One holds the basis, and releases it when it cannot publish."""
    made = trained()
    result = RunResult(made.adapter, made.basis)

    async def begin(race: Race) -> Any:
        ownership = await race.free.holds.reserve(TENANT, made.basis.manifest, "ftjob-a")
        assert ownership is not None
        await race.free.store.put_private(made.basis, ownership)
        return race.first.publisher.publish(job_of("b"), result), race.other.holds.let_go(TENANT, "ftjob-a")

    async def check(race: Race, outcome: Any) -> None:
        assert isinstance(outcome, AdapterVersion), outcome
        await race.free.holds.let_go(TENANT, "ftjob-b")
        assert await race.free.own.users(TENANT, made.basis.basis_id) == {"b"}
        assert (await race.free.store.get(made.basis.basis_id)).basis_id == made.basis.basis_id

    assert await run_all(redis, tiny, begin, check) > 20


async def test_what_cannot_be_published_does_not_take_the_basis_from_its_namesake(
    redis: Redis, tiny: BaseModel
) -> None:
    """Two jobs train one new adapter, and the R of one of them overflows the dtype that it is stored in."""
    basis = trained().basis

    async def publish_overflowing(worker: Worker) -> None:
        too_large = Adapter(basis.basis_id, torch.full((2, 2, 2), 1e6))
        with pytest.raises(InvalidInput):
            await worker.publisher.publish(job_of("b"), RunResult(too_large))

    async def begin(race: Race) -> Any:
        ownership = await race.free.holds.reserve(TENANT, basis.manifest, "ftjob-b")
        assert ownership is not None
        await race.free.store.put_private(basis, ownership)
        good = RunResult(Adapter(basis.basis_id, torch.ones(2, 2, 2)))
        return race.first.publisher.publish(job_of("b"), good), publish_overflowing(race.other)

    async def check(race: Race, outcome: Any) -> None:
        assert isinstance(outcome, AdapterVersion), outcome
        await race.free.holds.let_go(TENANT, "ftjob-b")
        assert await race.free.own.users(TENANT, basis.basis_id) == {"b"}

    await run_all(redis, tiny, begin, check)


async def test_a_job_cancelled_before_any_of_its_commands_leaves_nothing(
    redis: Redis, tiny: BaseModel
) -> None:
    for num_commands in count():
        race = await Race.in_empty_store(redis, tiny)
        work = race.first.begin(race.first.get(job_of("b")))
        has_more = await work.advance(num_commands)
        await work.cancel()
        await race.free.holds.let_go(TENANT, "ftjob-b")
        await check_nothing_left(race)
        if not has_more:
            assert num_commands > 5
            return
