"""Adapters in Redis: immutable versions, an alias to the active one, deletion that late writers cannot undo.

One version is one string (`adapter.py`); the record of an adapter is a hash beside it (`adapter_scripts.py`).
Knows nothing of jobs, HTTP or what a basis holds.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any

import torch
from redis.asyncio.cluster import RedisCluster

from tessera.errors import Conflict, CorruptRecord, InvalidInput, NotFound
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.redis import keys
from tessera.redis.client import Client, translate_errors
from tessera.store import adapter_scripts
from tessera.store.adapter_scripts import AdapterRecord, AdapterVersion, PublishTarget

__all__ = ["AdapterRecord", "AdapterStore", "AdapterVersion"]

log = logging.getLogger(__name__)

#: A publish meets a newer version only if another writer of the same adapter won, and one wins each round.
MAX_CONFLICTS = 64
#: Buckets asked for in one pipeline.
_PIPELINE_COMMANDS = 256
#: Bases whose adapters' size is remembered: more than are in use at once, and users may have their own.
MAX_KNOWN_SIZES = 1024


class AdapterStore:
    """The adapters of all tenants. Every method raises `StoreUnavailable`, writes also `StoreFull`."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis
        self._blob_bytes: dict[str, int] = {}  # by basis: its adapters are all of about one size

    async def deletion_count(self, tenant: str, adapter_id: str) -> int:
        """Return a number that grows with every deletion of this name; 0 without one in TOMBSTONE_TTL_S.

        It is the time of the deletion in ms, so that it keeps growing after a tombstone has expired. Raises
        `InvalidInput` for a malformed name.
        """
        _check_name(adapter_id, param="adapter_id")
        with translate_errors():
            value = await self._redis.hget(keys.adapter_tombstone(tenant, adapter_id), keys.TOMBSTONE_COUNT)
        return int(value or 0)

    async def publish(
        self,
        tenant: str,
        adapter_id: str,
        adapter: Adapter,
        *,
        dtype: torch.dtype,
        deletion_count: int | None = None,
        job_id: str | None = None,
        base_model_id: str = "",
    ) -> AdapterVersion:
        """Store the next version and activate it, in one step.

        deletion_count: the result of `deletion_count` when the work on this adapter began; None reads it now.
        With a job_id, a second call returns the version of the first. Raises `InvalidInput` (a malformed
        name, values that do not fit dtype), `AdapterDeleted` if the adapter was deleted since
        `deletion_count`.
        """
        _check_name(adapter_id, param="adapter_id")
        version, current = await self._next_version(tenant, adapter_id)
        fence = current if deletion_count is None else deletion_count
        target = PublishTarget(tenant, adapter_id, fence, base_model_id, token=secrets.token_hex(8))
        for _ in range(MAX_CONFLICTS):
            described, blob = _pack(adapter, version=version, dtype=dtype, job_id=job_id)
            outcome = await adapter_scripts.publish(self._redis, target, described, blob)
            if isinstance(outcome, AdapterVersion):
                return outcome
            version = outcome
        raise _too_busy(adapter_id)

    async def _next_version(self, tenant: str, adapter_id: str) -> tuple[int, int]:
        """The version that a publish would make now, and the deletion count; notes the bucket for `list`."""
        with translate_errors():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.sadd(keys.tenants(), tenant)
            pipeline.sadd(keys.tenant_buckets(tenant), keys.bucket(adapter_id))
            pipeline.hget(keys.adapter_record(tenant, adapter_id), "latest")
            pipeline.hmget(
                keys.adapter_tombstone(tenant, adapter_id), [keys.TOMBSTONE_COUNT, keys.TOMBSTONE_LAST]
            )
            _, _, latest, (deletion_count, last) = await pipeline.execute()
        return int(latest or last or 0) + 1, int(deletion_count or 0)

    async def get(self, tenant: str, adapter_id: str) -> AdapterRecord:
        """Raises `NotFound`."""
        fields = await self._fields(tenant, adapter_id)
        if not fields:
            raise _not_found(adapter_id)
        return AdapterRecord.from_hash(tenant, adapter_id, fields)

    async def _fields(self, tenant: str, adapter_id: str) -> Any:
        with translate_errors():
            return await self._redis.hgetall(_record(tenant, adapter_id))

    async def resolve(self, tenant: str, adapter_id: str, version: int | None = None) -> AdapterRef:
        """Name one version and its content, the active one by default, in one round trip; once per adapter in
        two, if an earlier release has published it. Raises `NotFound`."""
        record = _record(tenant, adapter_id)
        if version is not None:
            with translate_errors():
                pipeline = self._redis.pipeline(transaction=False)
                pipeline.hget(record, f"v:{version}")
                pipeline.getrange(
                    keys.adapter_blob(tenant, adapter_id, version), *adapter_scripts.CHECKSUM_RANGE
                )
                described, checksum = await pipeline.execute()
            if described is None:
                raise _not_found(adapter_id, version)
            basis_id = AdapterVersion.from_json(described).basis_id
            return AdapterRef(tenant, adapter_id, version, basis_id, checksum.hex())
        for _ in range(MAX_CONFLICTS):
            with translate_errors():
                values: Any = await self._redis.hmget(record, ["active", "basis", "checksum"])
            active, basis, noted = values
            if active is None or basis is None:
                raise _not_found(adapter_id)
            # An earlier release activates versions without noting their checksum.
            number, _, checksum = (noted or b"").partition(b":")
            if number == active:
                return AdapterRef(tenant, adapter_id, int(active), basis.decode(), checksum.hex())
            found = await adapter_scripts.note_checksum(self._redis, tenant, adapter_id, int(active))
            if found is not None:
                return AdapterRef(tenant, adapter_id, int(active), found[0], found[1].hex())
        raise _too_busy(adapter_id)

    async def fetch(self, refs: Sequence[AdapterRef]) -> list[bytes | None]:
        """The packed form of each version, None where it is gone. Not verified: `Adapter.from_bytes` does.

        One MGET for all that fits MAX_MGET_BYTES (on a cluster one per slot, in one pipeline per node).
        """
        blobs: list[bytes | None] = []
        while len(blobs) < len(refs):
            chunk = self._next_chunk(refs[len(blobs) :])
            names = [keys.adapter_blob(ref.tenant, ref.adapter_id, ref.version) for ref in chunk]
            with translate_errors():
                if isinstance(self._redis, RedisCluster):
                    values = await self._redis.mget_nonatomic(names)
                else:
                    values = await self._redis.mget(names)
            for ref, blob in zip(chunk, values, strict=True):
                if blob is not None:
                    self._note_size(ref.basis_id, len(blob))
            blobs.extend(values)
        return blobs

    def _note_size(self, basis_id: str, blob_bytes: int) -> None:
        self._blob_bytes[basis_id] = max(blob_bytes, self._blob_bytes.pop(basis_id, 0))
        if len(self._blob_bytes) > MAX_KNOWN_SIZES:
            del self._blob_bytes[next(iter(self._blob_bytes))]

    def _next_chunk(self, refs: Sequence[AdapterRef]) -> Sequence[AdapterRef]:
        """As many of the first refs as are expected to fit; the first one of an unknown basis goes alone."""
        total = 0
        for count, ref in enumerate(refs):
            total += self._blob_bytes.get(ref.basis_id, keys.MAX_MGET_BYTES)
            if total > keys.MAX_MGET_BYTES and count > 0:
                return refs[:count]
        return refs

    async def activate(self, tenant: str, adapter_id: str, version: int) -> AdapterRecord:
        """Point the alias to an existing version (a rollback is this). Raises `NotFound`."""
        if not keys.ADAPTER_ID.fullmatch(adapter_id) or not await adapter_scripts.activate(
            self._redis, tenant, adapter_id, version, now=time.time()
        ):
            raise _not_found(adapter_id, version)
        return await self.get(tenant, adapter_id)

    async def delete(self, tenant: str, adapter_id: str) -> bool:
        """Delete all versions; a tombstone refuses the work begun before. False: there is no such adapter."""
        if not keys.ADAPTER_ID.fullmatch(adapter_id):
            return False
        for _ in range(MAX_CONFLICTS):
            fields = await self._fields(tenant, adapter_id)  # not parsed: a broken record can be deleted too
            deleted = await adapter_scripts.delete(
                self._redis,
                tenant,
                adapter_id,
                latest=fields.get(b"latest", b""),
                versions=[int(name[2:]) for name in fields if name.startswith(b"v:")],
            )
            if deleted is not None:
                return deleted
        raise _too_busy(adapter_id)

    async def count(self) -> int:
        """Adapters of all tenants together."""
        total = 0
        with translate_errors():
            tenants: Any = await self._redis.smembers(keys.tenants())
            for tenant in tenants:
                name = tenant.decode()
                numbers = [int(n) for n in await self._redis.smembers(keys.tenant_buckets(name))]
                for start in range(0, len(numbers), _PIPELINE_COMMANDS):
                    pipeline = self._redis.pipeline(transaction=False)
                    for n in numbers[start : start + _PIPELINE_COMMANDS]:
                        pipeline.zcard(keys.adapter_index(name, n))
                    total += sum(await pipeline.execute())
        return total

    async def _page(self, tenant: str, after: str | None, limit: int) -> tuple[list[str], bool]:
        with translate_errors():
            numbers = sorted(int(n) for n in await self._redis.smembers(keys.tenant_buckets(tenant)))
            first = -1 if after is None else keys.bucket(after)
            numbers = [n for n in numbers if n >= first]
            names: list[str] = []
            while numbers and len(names) <= limit:
                pipeline = self._redis.pipeline(transaction=False)
                chunk, numbers = numbers[:_PIPELINE_COMMANDS], numbers[_PIPELINE_COMMANDS:]
                for n in chunk:
                    start = f"({after}" if n == first else "-"
                    pipeline.zrangebylex(keys.adapter_index(tenant, n), start, "+", start=0, num=limit + 1)
                for members in await pipeline.execute():
                    names.extend(member.decode() for member in members)
        return names[:limit], len(names) > limit

    async def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20
    ) -> tuple[list[AdapterRecord], bool]:
        """A page of adapters in the order of (bucket, name), and whether more follow.

        A record that cannot be read is left out, and logged. Raises `InvalidInput` if `after` is no name.
        """
        if after is not None:
            _check_name(after, param="after")
        names, has_more = await self._page(tenant, after, limit)
        with translate_errors():
            pipeline = self._redis.pipeline(transaction=False)
            for name in names:
                pipeline.hgetall(keys.adapter_record(tenant, name))
            hashes = await pipeline.execute() if names else []
        records = []
        for name, fields in zip(names, hashes, strict=True):
            if not fields:
                continue  # deleted since
            try:
                records.append(AdapterRecord.from_hash(tenant, name, fields))
            except CorruptRecord as error:
                log.error("left out of the list of tenant %s: %s", tenant, error)
        return records, has_more


def _pack(
    adapter: Adapter, *, version: int, dtype: torch.dtype, job_id: str | None
) -> tuple[AdapterVersion, bytes]:
    blob = adapter.to_bytes(version=version, dtype=dtype)
    described = AdapterVersion(
        version=version,
        created_at=time.time(),
        bytes=len(blob),
        basis_id=adapter.basis_id,
        rank=adapter.rank,
        dtype=str(dtype).removeprefix("torch."),
        job_id=job_id,
        metadata=adapter.metadata,
    )
    return described, blob


def _check_name(adapter_id: str, *, param: str) -> None:
    if not keys.ADAPTER_ID.fullmatch(adapter_id):
        allowed = "1 to 64 of a-z, 0-9, '.', '_', '-'; the first a letter or digit"
        raise InvalidInput(f"an adapter's name is {allowed}; got {adapter_id!r}", param=param)


def _record(tenant: str, adapter_id: str) -> str:
    """The record's key. Raises `NotFound` for what cannot be a name."""
    if not keys.ADAPTER_ID.fullmatch(adapter_id):
        raise _not_found(adapter_id)
    return keys.adapter_record(tenant, adapter_id)


def _not_found(adapter_id: str, version: int | None = None) -> NotFound:
    what = "adapter" if version is None else f"version {version} of adapter"
    return NotFound(f"there is no {what} {adapter_id!r}", param="model", code="model_not_found")


def _too_busy(adapter_id: str) -> Conflict:
    return Conflict(f"adapter {adapter_id!r} is being published by too many writers at once")
