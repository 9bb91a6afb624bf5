"""Adapters that come, change and go while they are being used."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import numpy as np
import torch
from redis.asyncio import Redis

from benchmarks.load.adapters import TENANT, make_adapter
from tessera.formats.manifest import BasisManifest
from tessera.redis import keys
from tessera.store.adapters import AdapterStore


class Churn:
    """About `num_alive` adapters of one tenant. counts: what was done to them."""

    def __init__(self, redis: Redis, manifest: BasisManifest, *, num_alive: int) -> None:
        self.counts: Counter[str] = Counter()
        self._redis = redis
        self._store = AdapterStore(redis)
        self._manifest = manifest
        self._num_alive = num_alive
        self._names: list[str] = []

    async def begin(self) -> None:
        for _ in range(self._num_alive):
            await self._create()

    def pick(self, rng: np.random.Generator) -> str:
        """A name that was alive just now; the first ones are asked for most."""
        return self._names[int(len(self._names) * rng.random() ** 2)]

    async def change(self, rng: np.random.Generator, port: int) -> None:
        """Train one again, or delete one for a new one, which in some cases is damaged from the beginning."""
        index = int(rng.integers(len(self._names)))
        name, kind = self._names[index], rng.random()
        if kind < 0.6:
            await self._publish(name, "published again")
            return
        self.counts["deleted"] += 1
        await _delete_over_http(port, name)
        self._names.pop(index)
        await self._create(is_damaged=kind > 0.9)

    async def _create(self, *, is_damaged: bool = False) -> None:
        self.counts["created"] += 1
        name = f"soak-{self.counts['created']}"
        await self._publish(name, "published")
        if is_damaged:
            self.counts["damaged"] += 1
            await self._redis.setrange(keys.adapter_blob(TENANT, name, 1), 500, b"damage")
        self._names.append(name)

    async def _publish(self, name: str, what: str) -> None:
        self.counts[what] += 1
        adapter = make_adapter(self._manifest, seed=self.counts.total())
        await self._store.publish(TENANT, name, adapter, dtype=torch.float16)


async def _delete_over_http(port: int, name: str) -> None:
    """As a user does, so that the engine is told."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"DELETE /v1/models/{name} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    status = int((await reader.readline()).split()[1])
    await reader.read()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    assert status == 200, f"the deletion of {name} was answered {status}"
