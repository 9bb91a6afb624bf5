"""Adapters in Redis: immutable versions, an alias to the active one, deletions that late writers cannot undo.

Each version is one string (`tessera/formats/adapter.py`). The record of an adapter is a hash beside its
versions (`adapter_scripts.py`). This module knows nothing of jobs, HTTP or the content of a basis.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redis.asyncio.cluster import RedisCluster

from tessera.errors import Conflict, CorruptRecord, InvalidInput, NotFound, TesseraError, Unavailable
from tessera.formats.adapter_ref import AdapterRef, checkpoint_step
from tessera.redis import keys
from tessera.redis.client import Client, translate_errors
from tessera.store import adapter_scripts
from tessera.store.adapter_scripts import AdapterRecord, AdapterVersion, PublishTarget
from tessera.store.checkpoints import CheckpointStore

if TYPE_CHECKING:
    import torch

    from tessera.formats.adapter import Adapter
    from tessera.store.ownership import PrivateBases

__all__ = ["AdapterRecord", "AdapterStore", "AdapterVersion", "publish_in_basis"]

log = logging.getLogger(__name__)

#: Attempts at a publish. One fails only if another writer of the same adapter won, and one wins each round.
MAX_CONFLICTS = 64
#: Buckets read in one pipeline.
_PIPELINE_COMMANDS = 256
#: Number of bases for which the size of an adapter is remembered. Users may have private bases, so there may
#: be many; this is more than are in use at once.
MAX_KNOWN_SIZES = 1024


class AdapterStore:
    """The adapters of all tenants. Every method raises `StoreUnavailable`, writes also `StoreFull`."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis
        #: Size of an adapter by basis: all adapters of one basis are of about the same size.
        self._blob_bytes: dict[str, int] = {}

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
        """Return the version that a publish would make now, and the deletion count.

        Also registers tenant and bucket, so that `list` and `count` find the adapter.
        """
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
        """Return an adapter with all its versions. Raises `NotFound`."""
        fields = await self._fields(tenant, adapter_id)
        if not fields:
            raise _not_found(adapter_id)
        return AdapterRecord.from_hash(tenant, adapter_id, fields)

    async def _fields(self, tenant: str, adapter_id: str) -> Any:
        with translate_errors():
            return await self._redis.hgetall(_record(tenant, adapter_id))

    async def resolve(self, tenant: str, adapter_id: str, version: int | None = None) -> AdapterRef:
        """Return a reference to one version (by default the active one) and its content, in one round trip.

        An adapter that an earlier release has published takes a second round trip, once. Raises `NotFound`.
        """
        record = _record(tenant, adapter_id)
        if version is not None:
            step = checkpoint_step(version)
            place, field = (record, f"v:{version}") if step is None else (
                keys.adapter_checkpoints(tenant, adapter_id), str(step)
            )  # fmt: skip
            with translate_errors():
                pipeline = self._redis.pipeline(transaction=False)
                pipeline.hget(place, field)
                pipeline.getrange(
                    keys.adapter_blob(tenant, adapter_id, version), *adapter_scripts.CHECKSUM_RANGE
                )
                described, checksum = await pipeline.execute()
            if described is None or (step is not None and not checksum):
                raise _not_found(adapter_id, version)
            basis_id = AdapterVersion.from_json(described).basis_id
            return AdapterRef(tenant, adapter_id, version, basis_id, checksum.hex())
        for _ in range(MAX_CONFLICTS):
            with translate_errors():
                values: Any = await self._redis.hmget(record, ["active", "basis", "checksum"])
            active, basis, noted = values
            if active is None or basis is None:
                raise _not_found(adapter_id)
            # Earlier releases activate versions without noting their checksum.
            number, _, checksum = (noted or b"").partition(b":")
            if number == active:
                return AdapterRef(tenant, adapter_id, int(active), basis.decode(), checksum.hex())
            found = await adapter_scripts.note_checksum(self._redis, tenant, adapter_id, int(active))
            if found is not None:
                return AdapterRef(tenant, adapter_id, int(active), found[0], found[1].hex())
        raise _too_busy(adapter_id)

    async def fetch(self, refs: Sequence[AdapterRef]) -> list[bytes | None]:
        """Return the packed form of each version, None where it is gone.

        The bytes are not verified here but in `Adapter.from_bytes`. Each MGET fetches up to MAX_MGET_BYTES
        (on a cluster there is one MGET per slot, in one pipeline per node).
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
        """Return as many of the first refs as are expected to fit into MAX_MGET_BYTES.

        A basis of unknown size counts as that much, so its first adapter is fetched alone.
        """
        total = 0
        for count, ref in enumerate(refs):
            total += self._blob_bytes.get(ref.basis_id, keys.MAX_MGET_BYTES)
            if total > keys.MAX_MGET_BYTES and count > 0:
                return refs[:count]
        return refs

    async def activate(self, tenant: str, adapter_id: str, version: int) -> AdapterRecord:
        """Point the alias to an existing version, for example to roll back. Raises `NotFound`."""
        if not keys.ADAPTER_ID.fullmatch(adapter_id) or not await adapter_scripts.activate(
            self._redis, tenant, adapter_id, version, now=time.time()
        ):
            raise _not_found(adapter_id, version)
        return await self.get(tenant, adapter_id)

    async def delete(self, tenant: str, adapter_id: str) -> bool:
        """Delete all versions and checkpoints. Return False if there is no such adapter.

        A tombstone refuses versions that late writers began before the deletion.
        """
        if not keys.ADAPTER_ID.fullmatch(adapter_id):
            return False
        for _ in range(MAX_CONFLICTS):
            # The fields are not parsed, so that a corrupt record can be deleted too.
            fields = await self._fields(tenant, adapter_id)
            deleted = await adapter_scripts.delete(
                self._redis,
                tenant,
                adapter_id,
                latest=fields.get(b"latest", b""),
                versions=[int(name[2:]) for name in fields if name.startswith(b"v:")],
            )
            if deleted:
                await CheckpointStore(self._redis).drop(tenant, adapter_id)
            if deleted is not None:
                return deleted
        raise _too_busy(adapter_id)

    async def count(self) -> int:
        """Return the number of adapters of all tenants together."""
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
        """Return a page of adapters ordered by (bucket, name), and whether more follow.

        A record that cannot be read is logged and left out. Raises `InvalidInput` if `after` is malformed.
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
                continue  # deleted since the index was read
            try:
                records.append(AdapterRecord.from_hash(tenant, name, fields))
            except CorruptRecord as error:
                log.error("an adapter is left out of the list of tenant %s: %s", tenant, error)
        return records, has_more


async def publish_in_basis(
    adapters: AdapterStore,
    private_bases: PrivateBases,
    tenant: str,
    adapter_id: str,
    adapter: Adapter,
    *,
    dtype: torch.dtype,
    deletion_count: int,
    job_id: str | None = None,
    base_model_id: str = "",
) -> AdapterVersion:
    """Note the adapter as a user of its basis, then publish it. Repeating this changes nothing.

    Raises what `AdapterStore.publish` raises, and `BasisDeleted`. After a permanent failure the note is
    withdrawn, and the basis is deleted if nothing else uses it.
    """
    # Values that cannot be stored must fail before the note is made: withdrawing it could withdraw the note
    # of another job that is publishing an adapter of the same name.
    adapter.to_bytes(version=1, dtype=dtype)
    await private_bases.use(tenant, adapter.basis_id, adapter_id, deletion_count=deletion_count)
    try:
        return await adapters.publish(
            tenant, adapter_id, adapter, dtype=dtype, deletion_count=deletion_count, job_id=job_id,
            base_model_id=base_model_id,
        )  # fmt: skip
    except Unavailable:
        raise  # the version may have been stored; the caller tries again
    except TesseraError:
        try:
            await adapters.get(tenant, adapter_id)
        except NotFound:
            await private_bases.release(tenant, adapter_id, deletion_count=deletion_count + 1)
        raise


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
        dtype=str(adapter.storage_dtype(dtype)).removeprefix("torch."),
        job_id=job_id,
        metadata=adapter.metadata,
    )
    return described, blob


def _check_name(adapter_id: str, *, param: str) -> None:
    if not keys.ADAPTER_ID.fullmatch(adapter_id):
        raise InvalidInput(
            "an adapter name consists of 1 to 64 of the characters a-z, 0-9, '.', '_' and '-', and begins "
            f"with a letter or digit; got {adapter_id!r}",
            param=param,
        )


def _record(tenant: str, adapter_id: str) -> str:
    """Return the key of the record. Raises `NotFound` for a malformed name."""
    if not keys.ADAPTER_ID.fullmatch(adapter_id):
        raise _not_found(adapter_id)
    return keys.adapter_record(tenant, adapter_id)


def _not_found(adapter_id: str, version: int | None = None) -> NotFound:
    missing = "adapter" if version is None else f"version {version} of adapter"
    if version is not None and (step := checkpoint_step(version)) is not None:
        missing = f"state after step {step} of adapter"
    return NotFound(f"there is no {missing} {adapter_id!r}", param="model", code="model_not_found")


def _too_busy(adapter_id: str) -> Conflict:
    return Conflict(f"too many writers publish adapter {adapter_id!r} at once; try again later")
