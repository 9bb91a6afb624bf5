"""Helpers of the tests of files and jobs: an upload, a job, and the worker's side of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
from redis.asyncio import Redis

from tessera.queue.leases import JobLeases

BASIS_ID = "b" * 64
JOBS = "/v1/fine_tuning/jobs"
EXAMPLE = json.dumps({"prompt": "a", "completion": "b"})
GOOD = f"{EXAMPLE}\n{EXAMPLE}\n".encode()


async def upload(
    client: httpx.AsyncClient, content: bytes = GOOD, filename: str = "data.jsonl", purpose: str = "fine-tune"
) -> httpx.Response:
    return await client.post("/v1/files", files={"file": (filename, content)}, data={"purpose": purpose})


async def create(client: httpx.AsyncClient, file_id: str, headers: Any = None, **body: Any) -> dict[str, Any]:
    sent = {"model": "tiny", "training_file": file_id, **body}
    reply = await client.post(JOBS, json=sent, headers=headers)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def run_job(redis: Redis) -> None:
    """Act as the worker of the only queued job: report some events, then a result."""
    leases = JobLeases(redis)
    (lease,) = await leases.claim("worker", limit=1, lease_s=60)
    for step in (1, 2):
        data = {"step": step, "train_loss": 1.0 / step}
        await leases.report(
            lease,
            type="metrics",
            message=f"step {step}",
            data=data,
            progress={"step": step, "total_steps": 2},
        )
    result = {
        "version": 1,
        "trained_tokens": 99,
        "best_step": 2,
        "best_valid_loss": 0.5,
        "basis_id": BASIS_ID,
    }
    await leases.complete(lease, result)
