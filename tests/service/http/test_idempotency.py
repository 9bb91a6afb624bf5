"""A job is created once, although the request to create it comes twice."""

from __future__ import annotations

import httpx
import pytest

from tests.service.training import JOBS, create


async def test_an_idempotency_key_gives_the_same_job(client: httpx.AsyncClient, file_id: str) -> None:
    headers = {"idempotency-key": "once"}

    first = await create(client, file_id, headers)

    assert (await create(client, file_id, headers))["id"] == first["id"]
    assert (await create(client, file_id))["id"] != first["id"]


async def test_an_idempotency_key_is_for_one_body(client: httpx.AsyncClient, file_id: str) -> None:
    headers = {"idempotency-key": "once"}
    await create(client, file_id, headers)

    reply = await client.post(
        JOBS, json={"model": "tiny", "training_file": file_id, "seed": 1}, headers=headers
    )

    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "idempotency_key_reused"


async def test_a_request_that_failed_leaves_its_key_unused(client: httpx.AsyncClient, file_id: str) -> None:
    headers = {"idempotency-key": "once"}
    refused = {"model": "nobody", "training_file": file_id}

    assert (await client.post(JOBS, json=refused, headers=headers)).status_code == 404
    assert (await create(client, file_id, headers))["status"] == "queued"


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_an_idempotency_key_has_a_length(client: httpx.AsyncClient, file_id: str, key: str) -> None:
    body = {"model": "tiny", "training_file": file_id}

    reply = await client.post(JOBS, json=body, headers={"idempotency-key": key})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_the_official_clients_retry_gives_the_job_of_the_newest_attempt(
    client: httpx.AsyncClient, file_id: str
) -> None:
    old = await create(client, file_id, {"x-stainless-retry-count": "0"})
    new = await create(client, file_id, {"x-stainless-retry-count": "0"})
    retried = await create(client, file_id, {"x-stainless-retry-count": "1"})
    other = await create(client, file_id, {"x-stainless-retry-count": "2"}, seed=9)

    assert retried["id"] == new["id"] != old["id"]
    assert other["id"] not in (old["id"], new["id"])
    assert (await create(client, file_id, {"x-stainless-retry-count": "3"}, seed=9))["id"] == other["id"]
