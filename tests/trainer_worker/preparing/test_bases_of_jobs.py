"""Bases and initializations of jobs in a worker: built from data, found again, held, counted, deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.errors import Conflict, NotFound
from tessera.formats.adapter import Adapter
from tessera.model.base_model import BaseModel
from tessera.queue.client import Job, JobQueue, JobSpec, JobStatus
from tessera.queue.leases import JobLeases
from tessera.redis import keys
from tessera.store.bases import BasisStore
from tessera.store.holds import BasisHolds
from tessera.store.ownership import PrivateBases
from tests.job_checks import check_queue, expire_lease
from tests.trainer_worker.conftest import DATA
from tests.trainer_worker.world import TENANT, SilentListener, World, messages
from tests.waiting import wait_until
from trainer_worker.preparing.basis_source import Attempt
from trainer_worker.training import checkpoint

#: Only a few modules, so that a basis is built quickly.
TARGETS = ["*.layers.0.*.v_proj", "*.layers.1.*.down_proj"]
SB = {
    "method": "lora_sb", "rank": 4, "calibration": "own", "target_modules": TARGETS,
    "start": {"method": "sb_step", "options": {}},
}  # fmt: skip


class Bases:
    """The stores in which the tests look up who owns the bases."""

    def __init__(self, redis: Redis) -> None:
        self.store = BasisStore(redis)
        self.own = PrivateBases(redis, max_bytes=2**40)
        self.holds = BasisHolds(redis, self.own)


@pytest.fixture
def world(redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path) -> World:
    return World(redis, tiny, chat, tmp_path)


@pytest.fixture
def bases(redis: Redis) -> Bases:
    return Bases(redis)


def result_of(job: Job) -> dict[str, Any]:
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert job.result is not None
    return job.result


def core_of(blob: bytes | None) -> torch.Tensor:
    assert blob is not None
    return Adapter.from_bytes(blob).R


def weights_of(base: BaseModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.model.state_dict().items()}


def assert_untouched(base: BaseModel, before: dict[str, torch.Tensor]) -> None:
    after = base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for module in base.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())


async def delete_adapter(world: World, bases: Bases, name: str, tenant: str = TENANT) -> None:
    """Delete an adapter as the service does."""
    assert await world.adapters.delete(tenant, name)
    deletion_count = await world.adapters.deletion_count(tenant, name)
    await bases.own.release(tenant, name, deletion_count=deletion_count)


async def test_an_own_basis_lives_from_its_first_adapter_to_its_last(world: World, bases: Bases) -> None:
    before = weights_of(world.base)
    async with world.worker():
        first = await world.ended(await world.submit(**SB))
        basis_id = result_of(first)["basis_id"]
        second = await world.ended(await world.submit(adapter_id="again", **SB))
    assert_untouched(world.base, before)

    start = result_of(first)["start"]
    assert start["method"] == "sb_step"
    assert start["losses"]["0"] > min(start["losses"].values())
    assert result_of(first)["initial_valid_loss"] is not None
    assert result_of(second)["basis_id"] == basis_id
    assert result_of(second)["start"] == start
    assert messages(await world.events(first.job_id), "built now")
    assert messages(await world.events(second.job_id), "built before")
    assert messages(await world.events(first.job_id), "Initialization sb_step: step size")
    manifest = await bases.store.manifest(basis_id)
    assert (manifest.method, manifest.rank, manifest.is_own) == ("lora_sb", 4, True)
    assert len(manifest.modules) == 2
    assert manifest.factor_bytes == 2 * 4 * sum(module.d_in + module.d_out for module in manifest.modules)
    assert await bases.own.of_tenant(TENANT) == {basis_id: manifest.factor_bytes}
    assert await bases.own.users(TENANT, basis_id) == {"devil", "again"}
    assert await bases.store.list() == []  # it is not shared

    with pytest.raises(Conflict, match="again, devil"):
        await bases.holds.delete(TENANT, basis_id)
    await delete_adapter(world, bases, "devil")
    assert await bases.own.of_tenant(TENANT) != {}
    await delete_adapter(world, bases, "again")
    assert await bases.own.of_tenant(TENANT) == {}
    with pytest.raises(NotFound):
        await bases.store.manifest(basis_id)
    assert not await world.redis.keys(f"{keys.PREFIX}:{{basis:{basis_id}}}*")


async def test_a_job_tried_again_gives_the_same_adapter_from_one_basis(world: World, bases: Bases) -> None:
    """Its worker died after preparing it, with or without a checkpoint of the initialization."""
    job = {**SB, "epochs": 1, "early_stopping": {"patience": None}}
    calm = await world.submit(adapter_id="calm", tenant="t1", **job)
    async with world.worker(max_resident_jobs=1):
        result_of(await world.ended(calm, "t1"))
    torn = await world.submit(adapter_id="torn", tenant="t2", **job)
    saved = await world.submit(adapter_id="saved", tenant="t3", **job)
    await die_prepared(world, with_checkpoint=saved)
    async with world.worker(max_resident_jobs=1):
        ended = {t: await world.ended(job_id, t) for t, job_id in (("t2", torn), ("t3", saved))}

    assert [(job.attempt, job.num_lost_workers) for job in ended.values()] == [(2, 1), (2, 1)]
    assert {result_of(job)["start"]["method"] for job in ended.values()} == {"sb_step"}
    assert len(messages(await world.events(torn, "t2"), "Initialization sb_step")) == 1
    assert messages(await world.events(saved, "t3"), "Initialization sb_step") == []
    for tenant, job_id in (("t2", torn), ("t3", saved)):
        assert messages(await world.events(job_id, tenant), "built before")
    names = {"t1": "calm", "t2": "torn", "t3": "saved"}
    refs = [await world.adapters.resolve(tenant, name) for tenant, name in names.items()]
    cores = [core_of(blob) for blob in await world.adapters.fetch(refs)]
    assert len({ref.basis_id for ref in refs}) == 1
    assert torch.equal(cores[0], cores[1])
    assert torch.equal(cores[0], cores[2])
    assert {tenant: len(await bases.own.of_tenant(tenant)) for tenant in names} == dict.fromkeys(names, 1)
    await check_queue(world.redis)


async def die_prepared(world: World, *, with_checkpoint: str) -> None:
    """Leave what a worker leaves that dies after preparing its jobs, one of them with a checkpoint."""
    leases, preparation = JobLeases(world.redis), world.make_worker()._services.preparation
    for lease in await leases.claim("dead", limit=2, lease_s=60):
        prepared = await preparation.prepare(Attempt(lease.job, SilentListener()), None)
        if lease.job.job_id == with_checkpoint:
            await leases.checkpoint(lease, checkpoint.to_bytes(prepared.run))
        await expire_lease(world.redis, lease.job.job_id)
    await leases.reap()


async def test_a_basis_job_builds_for_many_and_what_it_built_stays(world: World, bases: Bases) -> None:
    queue = JobQueue(world.redis, kind="basis")
    content = b"\n".join((DATA / "jargon.jsonl").read_bytes().split(b"\n")[:12])
    spec = JobSpec(
        kind="basis", base_model="tiny", method="lora_da", rank=4, target_modules=TARGETS,
        calibration=await world.upload(content),
    )  # fmt: skip
    first = (await queue.submit(TENANT, spec, cost=1)).job_id
    again = (await queue.submit(TENANT, spec, cost=1)).job_id

    async def ended(job_id: str) -> Job | None:
        job = await queue.get(TENANT, job_id)
        return job if job.status.is_final else None

    async with world.worker(max_resident_jobs=1):
        built, found = await wait_until(lambda: ended(first), 60), await wait_until(lambda: ended(again), 60)
        basis_id = result_of(built)["basis_id"]
        assert (result_of(built)["origin"], result_of(found)["origin"]) == ("built", "found")
        assert result_of(found)["basis_id"] == basis_id
        assert result_of(built)["calibration"]["num_examples"] == 12
        assert (built.progress["modules_done"], built.progress["modules"]) == (2, 2)
        job = await world.ended(
            await world.submit(basis_id=basis_id, epochs=1, start={"method": "da_step", "options": {}})
        )
    assert result_of(job)["start"]["method"] == "da_step"
    assert result_of(job)["basis_id"] == basis_id
    await delete_adapter(world, bases, "devil")
    assert set(await bases.own.of_tenant(TENANT)) == {basis_id}
    await bases.holds.delete(TENANT, basis_id)
    assert await bases.own.of_tenant(TENANT) == {}
    await check_queue(world.redis)


async def test_methods_without_labels_and_without_data(world: World, bases: Bases) -> None:
    """LoLoRA reads only text. LoRAM reads no data, so with its defaults its basis is shared."""
    hebbian = {"method": "lolora", "calibration": "own", "target_modules": TARGETS, "rank": 4}
    jobs = [
        await world.submit(adapter_id="lolora", epochs=1, **hebbian),
        await world.submit(adapter_id="loram", epochs=1, method="loram", rank=4),
    ]
    async with world.worker():
        lolora, loram = [result_of(await world.ended(job)) for job in jobs]
    assert set(await bases.own.of_tenant(TENANT)) == {lolora["basis_id"]}
    assert [manifest.basis_id for manifest in await bases.store.list()] == [loram["basis_id"]]
    assert (lolora["start"]["method"], loram["start"]["method"]) == ("zero", "zero")


async def test_the_papers_variants_from_a_job_to_its_adapter(world: World, bases: Bases) -> None:
    """LoRA-SB with noise, LoRA-DA as in theorem 4.2, LoRAM at the magnitude of CorDA: from the job's data."""
    own = {"calibration": "own", "target_modules": TARGETS, "rank": 4, "epochs": 1}
    noise = {"noise": 2.0}
    factor = {"output_factor": "block"}
    corda = {"magnitude": "tracking", "reference": "corda", "tracking": "factor"}
    jobs = [
        await world.submit(
            adapter_id="noisy", method="lora_sb", basis_options=noise,
            start={"method": "sb_step", "options": noise}, **own,
        ),
        await world.submit(
            adapter_id="block", method="lora_da", basis_options=factor,
            start={"method": "da_step", "options": factor}, **own,
        ),
        await world.submit(adapter_id="corda", method="loram", basis_options=corda, **own),
    ]  # fmt: skip
    async with world.worker(max_resident_jobs=1):
        results = [result_of(await world.ended(job)) for job in jobs]
    recipes = [(await bases.store.get(result["basis_id"])).manifest.recipe for result in results]
    assert [recipe["options"]["seed"] for recipe in recipes] == [0, 0, 0]
    assert recipes[0]["options"]["noise"] == 2.0
    assert recipes[1]["options"]["output_factor"] == "block"
    assert len(recipes[2]["notes"]["ratio"]) == 2, "the manifest alone makes it again"


async def test_a_job_cancelled_while_its_basis_is_built_leaves_nothing(world: World, bases: Bases) -> None:
    before = weights_of(world.base)
    slow = {**SB, "target_modules": None, "rank": 8, "epochs": 50}
    job_id = await world.submit(adapter_id="slow", **slow)
    async with world.worker(max_resident_jobs=1):

        async def has_begun() -> bool:
            return (await world.job(job_id)).progress != {}

        await wait_until(has_begun, 60)
        await world.queue.cancel(TENANT, job_id)
        assert (await world.ended(job_id)).status is JobStatus.CANCELLED
        other = await world.ended(await world.submit(epochs=1, **SB))
    result_of(other)
    assert_untouched(world.base, before)
    assert set(await bases.own.of_tenant(TENANT)) == {result_of(other)["basis_id"]}
    await check_queue(world.redis)


async def test_what_cannot_work_ends_its_job_alone_with_a_name(world: World, bases: Bases) -> None:
    world.common = {"max_own_basis_bytes": 100_000}
    far = {"method": "sb_step", "options": {"eta_init": "value", "eta": 1e38}}
    cases = {
        "start": ({**SB, "start": far}, "invalid_value", "is not finite"),
        "quota": ({**SB, "target_modules": None}, "basis_quota_exceeded", "exceed 100000 bytes"),
        "option": ({**SB, "basis_options": {"eta": 1.0}}, "invalid_value", "no option 'eta'"),
        "init": (
            {**SB, "start": {"method": "magic", "options": {}}},
            "invalid_value",
            "unknown initialization",
        ),
        "file": ({**SB, "calibration": "file-" + "0" * 24}, "file_not_found", "calibration"),
    }
    jobs = {name: await world.submit(adapter_id=name, **case[0]) for name, case in cases.items()}
    good = await world.submit(epochs=1)
    async with world.worker():
        result_of(await world.ended(good))
        for name, (_, code, words) in cases.items():
            job = await world.ended(jobs[name])
            assert job.error is not None, name
            assert (job.attempt, job.error["code"]) == (1, code), (name, job.error)
            assert words in job.error["message"], (name, job.error)
        await wait_until(lambda: no_bases(bases))
    assert await world.adapters.count() == 1
    await check_queue(world.redis)


async def no_bases(bases: Bases) -> bool:
    return await bases.own.of_tenant(TENANT) == {}


async def test_an_adapter_moves_to_another_basis_if_it_is_asked_for(world: World, bases: Bases) -> None:
    async with world.worker():
        first = result_of(await world.ended(await world.submit(epochs=2)))
        moved = {"method": "warm", "options": {"max_relative_loss": 1.0}}
        again = await world.submit(
            adapter_id="moved", epochs=1, rank=16, warm_start_from="devil@1", start=moved
        )
        second = result_of(await world.ended(again))
        wary = {"method": "warm", "options": {"max_relative_loss": 0.1}}
        other = {"method": "random", "warm_start_from": "devil@1", "start": wary}
        refused = await world.ended(await world.submit(adapter_id="refused", **other))
    assert second["basis_id"] != first["basis_id"]
    assert second["start"]["relative_loss"] < 1e-3  # the leading vectors of rank 8 are among those of rank 16
    assert second["initial_valid_loss"] == pytest.approx(first["best_valid_loss"], abs=5e-3)
    assert refused.error is not None
    assert "loses" in refused.error["message"]
