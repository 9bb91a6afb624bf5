"""The worker in this process, with a real store, queue and model: every way in which a job can end."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.errors import NotFound
from tessera.model.base_model import BaseModel
from tessera.queue.client import JobStatus
from tessera.queue.leases import JobLeases
from tessera.redis import keys
from tessera.redis.client import connect
from tessera.settings import CommonSettings
from tessera.store.bases import BasisStore, ensure_basis
from tests.job_checks import check_queue, expire_lease
from tests.servers import run_server
from tests.trainer_worker.world import TENANT, World, messages
from tests.waiting import wait_until
from trainer_worker.training.search.candidate import EQUAL_NATS


@pytest.fixture
def world(redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path) -> World:
    return World(redis, tiny, chat, tmp_path)


async def test_two_users_are_trained_together_and_served_what_they_taught(world: World) -> None:
    names = {"devil": "t1", "jargon": "t2"}
    whole = {"epochs": 3, "early_stopping": {"patience": None}}
    jobs = {name: await world.submit(name, tenant=tenant, **whole) for name, tenant in names.items()}
    async with world.worker() as worker:
        ended = {name: await world.ended(jobs[name], tenant) for name, tenant in names.items()}
        await wait_until(lambda: not worker.sessions)
    for name, job in ended.items():
        assert job.status is JobStatus.SUCCEEDED, job.error
        result = job.result
        assert result is not None
        assert result["best_valid_loss"] < result["initial_valid_loss"] - 0.1
        assert result["adapter"] == {"id": name, "version": 1}
        assert (result["num_examples"], result["num_validation"], result["truncated"]) == (12, 2, 0)
        assert result["steps"] == job.progress["total_steps"] == 15
        assert result["trained_tokens"] == job.progress["trained_tokens"] > 0
        record = await world.adapters.get(names[name], name)
        assert record.active_version == 1
        assert record.versions[0].bytes == result["adapter_bytes"]
        assert record.versions[0].job_id == job.job_id
        assert record.versions[0].metadata["valid_loss"] == result["best_valid_loss"]
        metrics = [
            event.data for event in await world.events(job.job_id, names[name]) if event.type == "metrics"
        ]
        losses = [data["valid_loss"] for data in metrics if "valid_loss" in data]
        assert losses[0] == pytest.approx(result["initial_valid_loss"])
        assert min(losses) <= result["best_valid_loss"] <= min(losses) + EQUAL_NATS
        assert any("train_loss" in data for data in metrics)
    with pytest.raises(NotFound):
        await world.adapters.get("t1", "jargon")
    await check_queue(world.redis)


BAD_JSONL = b'{"messages": [{"role": "user", "content": "Hi"}]}\n{"text": 3}\n'


async def test_faults_of_the_data_end_a_job_at_once_and_name_the_line(world: World) -> None:
    cases: dict[str, tuple[dict[str, Any], str, str | None]] = {
        "bad-lines": ({"training_file": await world.upload(BAD_JSONL)}, "invalid_training_file", "line 2"),
        "empty": ({"training_file": await world.upload(b"\n")}, "empty_file", None),
        "no-file": ({"training_file": "file-" + "0" * 24}, "file_not_found", "training_file"),
        "no-check": ({"validation_file": "file-" + "0" * 24}, "file_not_found", "validation_file"),
        "no-basis": ({"basis_id": "0" * 64}, "basis_not_found", None),
        "bad-rank": ({"rank": 300}, "invalid_value", "rank must be"),
        "bad-epochs": ({"hyperparameters": {"n_epochs": 0}}, "invalid_value", "n_epochs"),
        "other-model": ({"base_model": "llama"}, "invalid_value", "base model"),
        "no-start": ({"warm_start_from": "nobody@3"}, "model_not_found", "nobody"),
    }
    jobs = {name: await world.submit(adapter_id=name, **case[0]) for name, case in cases.items()}
    async with world.worker():
        for name, (_, code, words) in cases.items():
            job = await world.ended(jobs[name])
            assert (job.status, job.attempt) == (JobStatus.FAILED, 1), name
            assert job.error is not None
            assert job.error["code"] == code, (name, job.error)
            assert words is None or words in job.error["message"], (name, job.error)
    assert await world.adapters.count() == 0
    await check_queue(world.redis)


async def test_a_cancelled_job_ends_at_the_next_step_and_publishes_nothing(world: World) -> None:
    job_id = await world.submit(epochs=50)
    async with world.worker() as worker:
        await world.under_way(job_id)
        await world.queue.cancel(TENANT, job_id)
        assert (await world.ended(job_id)).status is JobStatus.CANCELLED
        await wait_until(lambda: not worker.sessions)
    assert await world.adapters.count() == 0
    await check_queue(world.redis)


async def test_a_paused_job_goes_on_where_it_stopped(world: World) -> None:
    job_id = await world.submit(epochs=3)
    async with world.worker():
        await world.under_way(job_id, step=2)
        await world.queue.pause(TENANT, job_id)

        async def is_paused() -> bool:
            return (await world.job(job_id)).status is JobStatus.PAUSED

        await wait_until(is_paused)
        await world.queue.resume(TENANT, job_id)
        job = await world.ended(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.attempt == 1
    [message] = messages(await world.events(job_id), "continues")
    assert int(message.split()[4]) >= 2
    await check_queue(world.redis)


async def test_a_stopped_worker_hands_its_job_back_and_the_result_is_the_same(world: World) -> None:
    """If it is alone in its batches, an interrupted job gives the same bytes as an uninterrupted one."""
    reference, job_id = await world.submit(adapter_id="a"), await world.submit(adapter_id="b")
    async with world.worker(max_resident_jobs=1):
        await world.ended(reference)
        await world.under_way(job_id, step=3)
    job = await world.job(job_id)
    assert job.status is JobStatus.QUEUED
    async with world.worker(max_resident_jobs=1):
        job = await world.ended(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.attempt == 1
    assert messages(await world.events(job_id), "continues")
    refs = [await world.adapters.resolve(TENANT, name) for name in ("a", "b")]
    blobs = await world.adapters.fetch(refs)
    payloads = [blob[-1000:] for blob in blobs if blob is not None]
    assert len(payloads) == 2
    assert payloads[0] == payloads[1]


@pytest.mark.parametrize(("lease_s", "stale_commits"), [(1, 0), (1000, 1)], ids=["renewal", "stale write"])
async def test_a_worker_that_lost_its_lease_drops_the_job(
    world: World, lease_s: float, stale_commits: int
) -> None:
    """It notices the loss at a renewal or, if none comes in time, because its next write is refused.

    It has room for one job only, because otherwise it might claim the job again before the other worker does.
    """
    job_id = await world.submit(epochs=50)
    other = JobLeases(world.redis)
    rare_writes = {"report_every_s": 1000, "checkpoint_every_s": 1000} if lease_s == 1 else {}
    async with world.worker(max_resident_jobs=1, reap_every_s=1000, lease_s=lease_s, **rare_writes) as worker:
        await world.under_way(job_id)

        async def is_taken_back() -> bool:
            await expire_lease(world.redis, job_id)  # again if the worker has renewed it in between
            return await other.reap() == {job_id: JobStatus.QUEUED}

        await wait_until(is_taken_back)
        [lease] = await other.claim("other", limit=1, lease_s=60)
        await wait_until(lambda: not worker.sessions)
        assert (await world.job(job_id)).status is JobStatus.RUNNING
        await other.complete(lease, {})
    refused = world.metrics.registry.get_sample_value("tessera_trainer_stale_commits_total")
    assert refused is not None
    assert refused >= stale_commits
    assert (await world.job(job_id)).result == {}
    assert await world.adapters.count() == 0
    await check_queue(world.redis)


async def test_an_adapter_deleted_while_it_was_trained_stays_deleted(world: World) -> None:
    first = await world.submit(epochs=1)
    async with world.worker():
        assert (await world.ended(first)).status is JobStatus.SUCCEEDED
        deletion_count = await world.adapters.deletion_count(TENANT, "devil")
        job_id = await world.submit(epochs=2, deletion_count=deletion_count)
        await world.under_way(job_id)
        await world.adapters.delete(TENANT, "devil")
        job = await world.ended(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "adapter_deleted"
    assert await world.adapters.count() == 0


async def test_a_warm_start_continues_an_adapter_as_its_next_version(world: World) -> None:
    basis = await ensure_basis(
        BasisStore(world.redis),
        world.base,
        method="lora_xs",
        rank=8,
        target_modules=CommonSettings().target_modules,
    )
    async with world.worker():
        first = (await world.ended(await world.submit(epochs=3))).result
        again = await world.submit(epochs=1, warm_start_from="devil@1", basis_id=basis.basis_id)
        second = (await world.ended(again)).result
    assert first is not None
    assert second is not None
    assert second["initial_valid_loss"] == pytest.approx(first["best_valid_loss"], abs=5e-3)
    assert second["adapter"] == {"id": "devil", "version": 2}
    assert second["basis_id"] == basis.basis_id


async def test_too_little_data_and_a_rate_that_is_too_high_are_told(world: World) -> None:
    few = await world.submit(lines=1, epochs=1)
    folded = await world.submit("jargon", adapter_id="folded", lines=4, epochs=1)
    high = {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 1e5}
    wild = await world.submit("jargon", hyperparameters=high)
    async with world.worker():
        job, diverged = await world.ended(few), await world.ended(wild)
        judged = await world.ended(folded)
    assert job.result is not None
    assert [warning["code"] for warning in job.result["warnings"]] == ["no_validation"]
    assert job.result["initial_valid_loss"] is None
    assert judged.result is not None
    assert judged.result["warnings"] == []
    assert judged.result["search"]["folds"] == 2
    assert judged.result["best_valid_loss"] < judged.result["initial_valid_loss"]
    if diverged.status is JobStatus.FAILED:
        assert diverged.error is not None
        assert diverged.error["code"] == "training_diverged"
    else:
        assert diverged.result is not None
        assert [warning["code"] for warning in diverged.result["warnings"]][-1] == "no_improvement"


async def test_workers_that_a_stalled_store_held_up_take_no_job_from_each_other(
    tiny: BaseModel, chat: ChatFormat, tmp_path: Path
) -> None:
    """When the store continues, the lease has expired by its clock. Both workers allow time to renew it."""
    socket = tmp_path / "s"
    with run_server(tmp_path, "--port", "0", "--unixsocket", str(socket)) as server:
        redis, second = (connect(f"unix://{socket}", timeout_s=0.3) for _ in range(2))
        await wait_until(socket.exists)
        await wait_until(redis.ping)
        world = World(redis, tiny, chat, tmp_path)
        job_id = await world.submit(epochs=50, early_stopping={"patience": None})
        quick = {"lease_s": 8, "reap_every_s": 0.05}
        async with world.worker(**quick), world.worker(second, **quick):
            await world.under_way(job_id)
            deadline = (await redis.zscore(keys.QUEUE_LEASES, job_id)) / 1000
            server.send_signal(signal.SIGSTOP)
            await wait_until(lambda: time.time() > deadline + 2)
            server.send_signal(signal.SIGCONT)
            step = int((await world.job(job_id)).progress["step"])
            await world.under_way(job_id, step + 2)
            job = await world.job(job_id)
            assert (job.attempt, job.epoch, job.num_lost_workers) == (1, 1, 0)
            await world.queue.cancel(TENANT, job_id)
            await world.ended(job_id)
        for client in (redis, second):
            await client.aclose()


async def test_training_goes_on_while_the_store_is_away(
    tiny: BaseModel, chat: ChatFormat, tmp_path: Path
) -> None:
    socket = tmp_path / "s"
    options = ("--port", "0", "--unixsocket", str(socket), "--appendonly", "yes", "--appendfsync", "always")
    redis = connect(f"unix://{socket}", timeout_s=0.5)
    with run_server(tmp_path, *options) as server:
        await wait_until(socket.exists)
        await wait_until(redis.ping)
        world = World(redis, tiny, chat, tmp_path)
        job_id = await world.submit(epochs=4, early_stopping={"patience": None})
        async with world.worker() as worker:
            await world.under_way(job_id)
            server.kill()
            server.wait()
            steps = world.steps_made()
            await wait_until(lambda: world.steps_made() >= steps + 3)
            with run_server(tmp_path, *options):
                job = await world.ended(job_id)
                assert job.status is JobStatus.SUCCEEDED
                assert (await world.adapters.get(TENANT, "devil")).latest_version == 1
                worker.stop()
                await wait_until(lambda: not worker.sessions)
    await redis.aclose()
