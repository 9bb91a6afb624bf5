"""Intermediate states of jobs as models: listed and asked by name, deleted alone or with the job."""

from __future__ import annotations

import time

import httpx
import openai
import pytest
import torch
from redis.asyncio import Redis

from tessera.formats.adapter import Adapter
from tessera.queue.leases import JobLeases, Lease
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tessera.store.checkpoints import CheckpointStore
from tests.fakes import FakeEngine
from tests.service.conftest import publish, small_basis
from tests.service.training import BASIS_ID, JOBS, create

METRICS = {
    "train_loss": 2.0, "train_mean_token_accuracy": 0.5, "valid_loss": 2.5, "valid_mean_token_accuracy": 0.4,
}  # fmt: skip
PROMPT = [{"role": "user", "content": "Hi"}]


async def put(redis: Redis, job_id: str, step: int, adapter_id: str = "anna") -> None:
    adapter = Adapter(BASIS_ID, torch.zeros(2, 4, 4), {**METRICS, "step": step})
    await CheckpointStore(redis).put(
        "default", adapter_id, adapter, step=step, job_id=job_id, created_at=time.time(),
        dtype=torch.float16, deletion_count=0, keep=3,
    )  # fmt: skip


async def running(client: httpx.AsyncClient, redis: Redis, file_id: str) -> tuple[str, Lease]:
    job_id = (await create(client, file_id, adapter={"id": "anna"}))["id"]
    [lease] = await JobLeases(redis).claim("worker", limit=1, lease_s=60)
    return job_id, lease


async def test_the_official_client_lists_and_asks_the_states_of_a_running_job(
    client: httpx.AsyncClient, official: openai.AsyncOpenAI, redis: Redis, file_id: str
) -> None:
    job_id, lease = await running(client, redis, file_id)
    for step in (10, 20):
        await put(redis, job_id, step)
    await put(redis, "ftjob-other", 5, "bob")

    found = [state async for state in official.fine_tuning.jobs.checkpoints.list(job_id, limit=1)]

    assert [state.fine_tuned_model_checkpoint for state in found] == [
        "anna:ckpt-step-20",
        "anna:ckpt-step-10",
    ]
    assert [state.step_number for state in found] == [20, 10]
    assert found[0].metrics.full_valid_loss == found[0].metrics.valid_loss == 2.5
    assert found[0].metrics.full_valid_mean_token_accuracy == 0.4
    assert (found[0].metrics.train_loss, found[0].fine_tuning_job_id) == (2.0, job_id)
    assert len({state.id for state in found}) == 2
    answer = await official.chat.completions.create(model="anna:ckpt-step-20", messages=PROMPT, max_tokens=2)
    assert answer.model == "anna:ckpt-step-20"
    assert answer.model_extra is not None
    assert answer.model_extra["adapter"] == {"id": "anna:ckpt-step-20", "version": None}
    assert (await official.models.retrieve("tiny:anna:ckpt-step-20")).owned_by == "default"
    with pytest.raises(openai.NotFoundError):
        await official.chat.completions.create(model="anna:ckpt-step-30", messages=PROMPT)
    await JobLeases(redis).complete(lease, {"version": 1, "best_step": 20, "best_valid_loss": 2.5})
    ended = [state async for state in official.fine_tuning.jobs.checkpoints.list(job_id)]
    assert [state.fine_tuned_model_checkpoint for state in ended] == [
        "anna@1", "anna:ckpt-step-20", "anna:ckpt-step-10",
    ]  # fmt: skip


async def test_training_goes_on_from_a_state(client: httpx.AsyncClient, redis: Redis, file_id: str) -> None:
    basis = small_basis()
    await BasisStore(redis).put(basis)
    state = Adapter(basis.basis_id, torch.zeros(2, 4, 4), METRICS)
    await CheckpointStore(redis).put(
        "default", "anna", state, step=7, job_id="ftjob-1", created_at=1.0, dtype=torch.float16,
        deletion_count=0, keep=3,
    )  # fmt: skip
    job = await create(client, file_id, model="anna:ckpt-step-7", adapter={"id": "bob"})
    assert job["model"] == "anna:ckpt-step-7"


async def test_a_state_can_be_deleted_by_its_name(
    client: httpx.AsyncClient, redis: Redis, engine: FakeEngine, file_id: str
) -> None:
    job_id, _ = await running(client, redis, file_id)
    for step in (10, 20):
        await put(redis, job_id, step)

    deleted = await client.delete("/v1/models/anna:ckpt-step-10")

    assert deleted.json() == {"id": "anna:ckpt-step-10", "object": "model", "deleted": True}
    assert (await client.delete("/v1/models/anna:ckpt-step-10")).status_code == 404
    listed = (await client.get(f"{JOBS}/{job_id}/checkpoints")).json()["data"]
    assert [state["step_number"] for state in listed] == [20]


async def test_states_end_with_a_cancelled_job_and_with_the_adapter(
    client: httpx.AsyncClient, redis: Redis, adapters: AdapterStore, file_id: str
) -> None:
    job_id, lease = await running(client, redis, file_id)
    await put(redis, job_id, 10)
    await JobLeases(redis).release(lease)
    assert (await client.post(f"{JOBS}/{job_id}/cancel")).json()["status"] == "cancelled"
    assert (await client.get(f"{JOBS}/{job_id}/checkpoints")).json()["data"] == []

    await publish(adapters, "anna")
    await put(redis, job_id, 10)
    assert (await client.delete("/v1/adapters/anna")).status_code == 200
    assert (await client.get("/v1/models/anna:ckpt-step-10")).status_code == 404
