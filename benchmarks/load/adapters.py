"""Many stored adapters in little time: records and blobs as a publish leaves them, written in bulk.

The blobs are valid and few (their names stand in the keys only), because packing and not Redis would take
the time: a million adapters of rank 4 of the bundled model in some minutes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from redis.asyncio import Redis

from tessera.formats.adapter import Adapter
from tessera.formats.manifest import BasisManifest
from tessera.redis import keys
from tessera.store.adapters import AdapterVersion

TENANT = "default"
#: Adapters of a size that training gives: the outputs differ, the model does not break.
R_SCALE = 0.05
NUM_BLOBS = 64
_BATCH = 500


def adapter_name(prefix: str, index: int) -> str:
    return f"{prefix}-{index}"


def make_adapter(manifest: BasisManifest, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(manifest.modules), manifest.rank, manifest.rank)
    return Adapter(manifest.basis_id, R_SCALE * torch.randn(shape, generator=generator))


async def store_adapters(redis: Redis, manifest: BasisManifest, *, prefix: str, count: int) -> None:
    """Store adapters `<prefix>-0` … of one version each, in float16."""
    blobs = [
        make_adapter(manifest, seed).to_bytes(version=1, dtype=torch.float16)
        for seed in range(min(count, NUM_BLOBS))
    ]
    now = time.time()
    version = AdapterVersion(1, now, len(blobs[0]), manifest.basis_id, manifest.rank, "float16")
    record: dict[bytes | bytearray | memoryview | str | int | float, Any] = {
        "v:1": version.to_json(),
        "active": 1,
        "latest": 1,
        "basis": manifest.basis_id,
        "base_model_id": manifest.model_id,
        "created_at": now,
        "updated_at": now,
    }
    await redis.sadd(keys.tenants(), TENANT)
    for indices in _batches(count):
        pipeline = redis.pipeline(transaction=False)
        for index in indices:
            name = adapter_name(prefix, index)
            pipeline.sadd(keys.tenant_buckets(TENANT), keys.bucket(name))
            pipeline.set(keys.adapter_blob(TENANT, name, 1), blobs[index % len(blobs)])
            pipeline.hset(keys.adapter_record(TENANT, name), mapping=record)
            pipeline.zadd(keys.adapter_index(TENANT, keys.bucket(name)), {name: 0})
        await pipeline.execute()


def _batches(count: int) -> Iterator[range]:
    for start in range(0, count, _BATCH):
        yield range(start, min(start + _BATCH, count))
