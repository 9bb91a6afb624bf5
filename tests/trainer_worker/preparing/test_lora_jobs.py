"""Jobs that train A and B: from the queue to a basis of the tenant's own with its adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.errors import Conflict, CorruptRecord
from tessera.formats.adapter import Adapter
from tessera.model.base_model import BaseModel
from tessera.queue.client import Job, JobSpec, JobStatus
from tessera.settings import CommonSettings
from tessera.store.bases import BasisStore
from tessera.store.checkpoints import CheckpointStore
from tessera.store.holds import BasisHolds
from tessera.store.ownership import PrivateBases
from tests.job_checks import check_queue
from tests.trainer_worker.conftest import random_examples
from tests.trainer_worker.world import TENANT, World, messages
from tests.waiting import wait_until
from trainer_worker.data.training_data import TrainingData
from trainer_worker.outcome import payloads
from trainer_worker.outcome.publisher import Publisher
from trainer_worker.training import checkpoint
from trainer_worker.training.lora.factors import LoraFactors, initial_factors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.run import RunResult

LORA = {"form": "lora", "rank": 4}


@pytest.fixture
def world(redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path) -> World:
    return World(redis, tiny, chat, tmp_path)


@pytest.fixture
def own(redis: Redis) -> PrivateBases:
    return PrivateBases(redis, max_bytes=CommonSettings().max_own_basis_bytes)


async def stored(world: World, name: str) -> bytes:
    [blob] = await world.adapters.fetch([await world.adapters.resolve(TENANT, name)])
    assert blob is not None
    return blob


async def test_lora_and_core_jobs_train_side_by_side(world: World, own: PrivateBases) -> None:
    whole = {"epochs": 1, "lines": 10, "early_stopping": {"patience": None}}
    alone = await world.submit(adapter_id="alone", **whole)
    async with world.worker(max_resident_jobs=1):
        await world.ended(alone)
    jobs = {
        "pissa": await world.submit("jargon", adapter_id="pissa", method="pissa", **LORA, **whole),
        "data": await world.submit("jargon", adapter_id="data", method="lora_one", **LORA, **whole),
        "beside": await world.submit(adapter_id="beside", **whole),
    }
    async with world.worker(max_resident_jobs=3) as worker:
        ended = {name: await world.ended(job_id) for name, job_id in jobs.items()}
        await wait_until(lambda: not worker.sessions)
    for name, job in ended.items():
        assert job.status is JobStatus.SUCCEEDED, (name, job.error)
        assert job.result is not None
        assert job.result["best_valid_loss"] < job.result["initial_valid_loss"], name
    assert (await stored(world, "beside"))[-1000:] == (await stored(world, "alone"))[-1000:]

    result = ended["pissa"].result
    assert result is not None
    basis = await BasisStore(world.redis).get(result["basis_id"])
    adapter = Adapter.from_bytes(await stored(world, "pissa"), basis_id=basis.basis_id)
    assert (basis.rank, adapter.rank, basis.manifest.is_own) == (8, 8, True)
    assert adapter.metadata["preset"] == "pissa"
    assert adapter.metadata["valid_loss"] == result["best_valid_loss"]
    [version] = (await world.adapters.get(TENANT, "pissa")).versions
    assert version.dtype == "float32"
    assert set(await own.of_tenant(TENANT)) == {ended[name].result["basis_id"] for name in ("pissa", "data")}
    assert await own.users(TENANT, basis.basis_id) == {"pissa"}, "the job has let go"
    events = await world.events(jobs["pissa"])
    assert messages(events, "LoRA form pissa, rank 4: trains A and B of 42 modules")
    assert any("train_loss" in event.data for event in events)
    await check_queue(world.redis)


async def test_an_interrupted_job_gives_bitwise_what_an_uninterrupted_one_gives(world: World) -> None:
    """LoLoRA trains B by the gradient and A by a local rule, whose state must survive as well."""
    spec = {"method": "lolora", "epochs": 4, "early_stopping": {"patience": None}, **LORA}
    reference, job_id = await world.submit(adapter_id="a", **spec), await world.submit(adapter_id="b", **spec)
    async with world.worker(max_resident_jobs=1):
        await world.ended(reference)
        await world.under_way(job_id, step=2)
    assert (await world.job(job_id)).status is JobStatus.QUEUED
    async with world.worker(max_resident_jobs=1):
        job = await world.ended(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert messages(await world.events(job_id), "continues")
    refs = [await world.adapters.resolve(TENANT, name) for name in ("a", "b")]
    assert refs[0].basis_id == refs[1].basis_id
    assert (await stored(world, "a"))[-1000:] == (await stored(world, "b"))[-1000:]


async def test_a_paused_job_goes_on_from_what_it_took_off_the_weights(world: World) -> None:
    job_id = await world.submit(method="milora", epochs=4, early_stopping={"patience": None}, **LORA)
    async with world.worker():
        await world.under_way(job_id, step=2)
        await world.queue.pause(TENANT, job_id)

        async def is_paused() -> bool:
            return (await world.job(job_id)).status is JobStatus.PAUSED

        await wait_until(is_paused)
        await world.queue.resume(TENANT, job_id)
        job = await world.ended(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 1)
    assert messages(await world.events(job_id), "continues")
    assert job.result is not None
    assert job.result["best_valid_loss"] < job.result["initial_valid_loss"]
    await check_queue(world.redis)


async def test_what_ends_without_a_version_leaves_no_basis(world: World, own: PrivateBases) -> None:
    cancelled = await world.submit(epochs=50, method="lora", **LORA)
    async with world.worker(max_resident_jobs=1):
        await world.under_way(cancelled)
        await world.queue.cancel(TENANT, cancelled)
        assert (await world.ended(cancelled)).status is JobStatus.CANCELLED
        deletion_count = await world.adapters.deletion_count(TENANT, "gone")
        deleted = await world.submit(
            adapter_id="gone", epochs=2, method="lora", deletion_count=deletion_count - 1, **LORA
        )
        # The tombstone is newer than the job's deletion count.
        await world.adapters.publish(
            TENANT, "gone", Adapter("b" * 64, torch.zeros(1, 2, 2)), dtype=torch.half
        )
        await world.adapters.delete(TENANT, "gone")
        job = await world.ended(deleted)
    assert job.error is not None
    assert job.error["code"] == "adapter_deleted"
    assert await own.of_tenant(TENANT) == {}
    assert not [key async for key in world.redis.scan_iter(match="*:owners")]


async def test_two_jobs_do_not_train_for_one_place(
    world: World, own: PrivateBases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is quota for one result: the second job fails before it trains, the first one can publish."""
    monkeypatch.setenv("TESSERA_MAX_OWN_BASIS_BYTES", "200000")
    spec = {"form": "lora", "method": "lora", "rank": 1}
    first = await world.submit(adapter_id="a", epochs=3, **spec)
    async with world.worker(max_resident_jobs=2) as worker:
        await world.under_way(first)
        second = await world.submit(adapter_id="b", **spec)
        job = await world.ended(second)
        assert job.error is not None
        assert (job.error["code"], job.attempt) == ("basis_quota_exceeded", 1)
        ended = await world.ended(first)
        await wait_until(lambda: not worker.sessions)
    assert ended.result is not None
    assert await own.of_tenant(TENANT) == {ended.result["basis_id"]: 116_736}


async def test_a_bad_request_ends_its_job_before_any_work(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {
        "dora": ({"method": "dora"}, "invalid_value", "unknown LoRA form"),
        "wide": ({"method": "pissa", "rank": 100}, "invalid_value", "rank must be at most 64 for pissa"),
        "option": (
            {"basis_options": {"colour": 3}, "method": "pissa"},
            "invalid_value",
            "no option 'colour'",
        ),
        "quota": ({"method": "lora"}, "basis_quota_exceeded", "exceed 100000 bytes"),
    }
    monkeypatch.setenv("TESSERA_MAX_OWN_BASIS_BYTES", "100000")
    jobs = {}
    for name, (spec, _, _) in cases.items():
        fields: dict[str, Any] = {"form": "lora", "rank": 64 if name == "quota" else 1} | spec
        jobs[name] = await world.submit(adapter_id=name, **fields)
    async with world.worker():
        for name, (_, code, words) in cases.items():
            job = await world.ended(jobs[name])
            assert (job.status, job.attempt) == (JobStatus.FAILED, 1), name
            assert job.error is not None
            assert (job.error["code"], words in job.error["message"]) == (code, True), (name, job.error)
    assert await world.adapters.count() == 0


# The parts, without a worker


def trained(base: BaseModel, name: str, *, steps: int = 3, seed: int = 0) -> LoraRun:
    data = TrainingData(random_examples(1, 12), random_examples(2, 4), digest="lora")
    plan = TrainingPlan(1, 4, total_steps=6, learning_rate=1e-2, seed=seed, evaluate_every=2)
    run = LoraRun(name, data, plan, initial_factors(base, name, rank=2, seed=seed))
    trainer = LoraTrainer(base, [run], token_budget=10_000)
    for _ in range(steps):
        trainer.step()
    trainer.release()
    return run


def blank(run: LoraRun) -> LoraRun:
    factors = run.factors
    zeros = [tuple(torch.zeros_like(X) for X in side) for side in (factors.A, factors.B)]
    return LoraRun(run.run_id, run.data, run.plan, replace(factors, A=zeros[0], B=zeros[1]))


def finish(base: BaseModel, run: LoraRun) -> LoraRun:
    trainer = LoraTrainer(base, [run], token_budget=10_000)
    while not run.is_finished:
        trainer.step()
    trainer.release()
    return run


@pytest.mark.parametrize("name", ["lora_plus", "pissa", "lolora", "lolora_svd"])
def test_a_checkpoint_holds_all_that_training_needs(small: BaseModel, name: str) -> None:
    run = trained(small, name)
    other = blank(run)
    checkpoint.restore(other, checkpoint.to_bytes(run))
    assert other.progress == run.progress
    finish(small, run)
    finish(small, other)
    for field in ("R", "m", "v", "best_R"):
        assert torch.equal(getattr(run, field), getattr(other, field)), field
    for side in ("A", "B"):
        if run.factors.preset.is_subtracted:
            pairs = zip(getattr(run.factors, side), getattr(other.factors, side), strict=True)
            assert all(torch.equal(X, Y) for X, Y in pairs)


def test_a_checkpoint_of_another_form_or_a_spoiled_one_is_refused(small: BaseModel) -> None:
    run = trained(small, "pissa")
    content = checkpoint.to_bytes(run)
    for other in (trained(small, "milora", steps=0), trained(small, "pissa", steps=0, seed=1)):
        with pytest.raises(Conflict):
            checkpoint.restore(other, content)
    online = trained(small, "lolora")
    for spoiled, lost in ((run, "initial"), (online, "moment1")):
        tensors = safetensors.torch.load(checkpoint.to_bytes(spoiled))
        kept = {name: X for name, X in tensors.items() if not name.endswith(lost)}
        with pytest.raises(KeyError, match=lost):
            blank(spoiled).restore_more(kept)
    with pytest.raises(CorruptRecord):
        checkpoint.restore(blank(run), content[:-1])


async def test_a_second_attempt_that_trained_otherwise_publishes_nothing(
    redis: Redis, small: BaseModel, own: PrivateBases, world: World
) -> None:
    bases, holds = BasisStore(redis), BasisHolds(redis, own)
    publisher = Publisher(
        world.adapters, bases, own, holds, dtype=torch.float16, base_model_id=small.model_id,
        checkpoints=CheckpointStore(redis), keep_checkpoints=0,
    )  # fmt: skip
    job = await submitted(world)

    def result_of(run: LoraRun) -> RunResult:
        return run.to_result(small, payloads.adapter_metadata(run, job))

    first = result_of(trained(small, "lora"))
    version = await publisher.publish(job, first)
    other = result_of(trained(small, "lora", seed=1))
    assert other.adapter.basis_id != first.adapter.basis_id
    assert await publisher.publish(job, other) == version
    await holds.let_go(TENANT, job.job_id)
    assert list(await own.of_tenant(TENANT)) == [first.adapter.basis_id]
    assert len((await world.adapters.get(TENANT, "ada")).versions) == 1


async def submitted(world: World) -> Job:
    spec = JobSpec(adapter_id="ada", training_file="file-1", base_model="small", form="lora", method="lora")
    return await world.queue.submit(TENANT, spec, cost=1)


def test_initial_factors_report_their_progress(small: BaseModel) -> None:
    seen: list[tuple[int, int]] = []
    factors: LoraFactors = initial_factors(
        small, "pissa", rank=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i + 1, len(factors.modules)) for i in range(len(factors.modules))]
