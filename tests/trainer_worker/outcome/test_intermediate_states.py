"""The states of a running job that can be asked as models: their content, their number, and their end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.errors import NotFound
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import checkpoint_step, checkpoint_version
from tessera.model.base_model import BaseModel
from tessera.queue.client import JobStatus
from tessera.store.checkpoints import CheckpointStore
from tests.trainer_worker.world import TENANT, World
from tests.waiting import wait_until


@pytest.fixture
def world(redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path) -> World:
    return World(redis, tiny, chat, tmp_path)


async def states(world: World) -> dict[int | None, dict[str, float]]:
    found = await CheckpointStore(world.redis).of_adapter(TENANT, "devil")
    return {checkpoint_step(state.version): state.metadata for state in found}


async def test_the_evaluated_states_of_a_job_are_models(world: World) -> None:
    job_id = await world.submit(epochs=4, early_stopping={"patience": None})
    async with world.worker(keep_checkpoints=3, learning_rate_search=False):
        job = await world.ended(job_id)
    assert job.result is not None
    found = await states(world)
    every = -(-job.progress["total_steps"] // 8)
    assert list(found) == [20, 18, 15]
    assert every == 3
    for step, metadata in found.items():
        assert metadata["valid_loss"] > 0
        assert metadata["train_loss"] > 0
        assert metadata["step"] == step
    best = job.result["best_step"]
    if best in found:
        assert found[best]["valid_loss"] == pytest.approx(job.result["best_valid_loss"], rel=1e-5)
        refs = [
            await world.adapters.resolve(TENANT, "devil", version)
            for version in (1, checkpoint_version(best))
        ]
        R = [
            Adapter.of_version(ref, blob).R
            for ref, blob in zip(refs, await world.adapters.fetch(refs), strict=True)
        ]
        assert torch.equal(*R), "the state of the best step is what was published"
    continued = await world.submit(
        adapter_id="on", epochs=1, warm_start_from="devil:ckpt-step-15", basis_id=job.result["basis_id"]
    )
    async with world.worker(learning_rate_search=False):
        second = await world.ended(continued)
    assert second.result is not None
    assert second.result["initial_valid_loss"] == pytest.approx(found[15]["valid_loss"], abs=5e-3)


async def test_states_are_there_while_the_job_runs_and_gone_once_it_is_cancelled(world: World) -> None:
    job_id = await world.submit(epochs=50, early_stopping={"patience": None})
    async with world.worker(learning_rate_search=False) as worker:
        await world.under_way(job_id, step=33)  # evaluated every 32 steps

        async def is_there() -> bool:
            return 32 in await states(world)

        await wait_until(is_there)
        await world.adapters.resolve(TENANT, "devil", checkpoint_version(32))
        with pytest.raises(NotFound):
            await world.adapters.resolve(TENANT, "devil")
        await world.queue.cancel(TENANT, job_id)
        assert (await world.ended(job_id)).status is JobStatus.CANCELLED
        await wait_until(lambda: not worker.sessions)
    assert await states(world) == {}


async def test_a_worker_may_keep_none(world: World) -> None:
    job_id = await world.submit(epochs=1)
    async with world.worker(keep_checkpoints=0, learning_rate_search=False):
        assert (await world.ended(job_id)).status is JobStatus.SUCCEEDED
    assert await states(world) == {}


async def test_a_search_shows_the_states_of_the_candidate_that_leads(world: World) -> None:
    job_id = await world.submit(lines=16, epochs=2)
    async with world.worker(learning_rate_search=True, report_samples=1):
        job = await world.ended(job_id)
    assert job.result is not None
    assert len(job.result["search"]["candidates"]) == 4
    found = await states(world)
    assert len(found) == 3
    assert all(metadata["valid_loss"] > 0 for metadata in found.values())
    best = job.result["best_step"]
    if best in found:
        assert found[best]["valid_loss"] == pytest.approx(job.result["best_valid_loss"], rel=1e-4)
    page = (await world.files.content(TENANT, job.result["result_files"][1])).decode()
    assert "Candidates of the search" in page
    assert page.count('class="chosen"') == 1
