"""Every row of the papers' tables (`benchmarks/papers`) is a job that the service accepts."""

from __future__ import annotations

import httpx
import pytest
from redis.asyncio import Redis

from benchmarks.papers.tables import TABLES
from tessera.queue.client import JobQueue
from tests.service.training import create


@pytest.mark.parametrize("name", TABLES)
async def test_every_row_is_a_job(client: httpx.AsyncClient, file_id: str, redis: Redis, name: str) -> None:
    table = TABLES[name]
    assert len({row.name for row in table.rows}) == len(table.rows)
    for row in table.rows:
        for rate in table.rates:
            hyperparameters = {"n_epochs": 3, "batch_size": 8, **rate}
            job = await create(
                client, file_id, adapter=dict(row.adapter), hyperparameters=hyperparameters, seed=0
            )
            spec = (await JobQueue(redis).get("default", job["id"])).spec
            assert rate.items() <= spec.hyperparameters.items(), row.name
            assert spec.rank == row.adapter["rank"]
