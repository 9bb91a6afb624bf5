"""The record of an adapter in Redis and the atomic steps on it, one typed function around each Lua script.

All keys of a script lie in the bucket of one adapter. Repeating a step changes nothing, because a client that
lost its connection cannot know whether the server carried the step out. The record is a hash:

    active, latest, basis (of the active version), base_model_id, created_at, updated_at
    v:<n>         JSON of AdapterVersion        job:<id>  the version that this job published
    call, called  the last publish without a job: its random token and its version
    checksum      "<active version>:<checksum of its blob>"
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tessera.errors import AdapterDeleted, CorruptRecord
from tessera.formats.adapter_ref import CHECKSUM
from tessera.redis import keys
from tessera.redis.client import Argument, Client, Script

#: The first and the last byte of the checksum in a packed adapter, for GETRANGE.
CHECKSUM_RANGE = (CHECKSUM.start, CHECKSUM.stop - 1)

_VERSION_FIELD = b"v:"


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable version of an adapter."""

    version: int
    created_at: float  # Unix time
    bytes: int  # size of the packed form
    basis_id: str
    rank: int
    dtype: str
    job_id: str | None = None  # None if no job made it
    metadata: dict[str, Any] = field(default_factory=dict)  # the adapter's own

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | builtins.bytes) -> AdapterVersion:
        """Parse a stored version. Raises `CorruptRecord`."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise CorruptRecord(
                f"the description of an adapter version in the store cannot be read: {error}"
            ) from error


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter with all its versions."""

    tenant: str
    adapter_id: str
    active_version: int
    latest_version: int
    created_at: float  # Unix time
    updated_at: float  # Unix time
    base_model_id: str
    versions: tuple[AdapterVersion, ...]  # oldest first

    @classmethod
    def from_hash(cls, tenant: str, adapter_id: str, fields: Mapping[bytes, bytes]) -> AdapterRecord:
        """Read the record from its hash in Redis. Raises `CorruptRecord`."""
        versions = [
            AdapterVersion.from_json(fields[name]) for name in fields if name.startswith(_VERSION_FIELD)
        ]
        try:
            return cls(
                tenant=tenant,
                adapter_id=adapter_id,
                active_version=int(fields[b"active"]),
                latest_version=int(fields[b"latest"]),
                created_at=float(fields[b"created_at"]),
                updated_at=float(fields[b"updated_at"]),
                base_model_id=fields[b"base_model_id"].decode(),
                versions=tuple(sorted(versions, key=lambda version: version.version)),
            )
        except (ValueError, KeyError) as error:
            raise CorruptRecord(
                f"the record of adapter {adapter_id!r} in the store cannot be read: {error!r}"
            ) from error


_TOMBSTONE_FIELDS = f"local COUNT, LAST = '{keys.TOMBSTONE_COUNT}', '{keys.TOMBSTONE_LAST}'"

# KEYS: record, blob of the version, tombstone, index
# ARGV: version, deletion count, job field or "", token, version JSON, blob, basis id, base model id,
#       adapter id, now, "<version>:<checksum of the blob>"
# Reply: {"done", version JSON} | {"conflict", next version} | {"deleted"}
_PUBLISH = Script(
    _TOMBSTONE_FIELDS
    + """
local record, blob, tombstone, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local version, job, token, now = tonumber(ARGV[1]), ARGV[3], ARGV[4], ARGV[10]

-- Was this very publish carried out before? Then return what it made.
local prior
if job ~= '' then
  prior = redis.call('HGET', record, job)
elseif redis.call('HGET', record, 'call') == token then
  prior = redis.call('HGET', record, 'called')
end
if prior then
  return {'done', redis.call('HGET', record, 'v:' .. prior)}
end

-- Refuse work that began before the adapter was deleted.
local fence = redis.call('HMGET', tombstone, COUNT, LAST)
if tonumber(ARGV[2]) < tonumber(fence[1] or 0) then
  return {'deleted'}
end

-- Version numbers continue after a deletion; only the next one may be published.
local latest = tonumber(redis.call('HGET', record, 'latest') or fence[2] or 0)
if version ~= latest + 1 then
  return {'conflict', latest + 1}
end

-- Store the version and make it the active one.
redis.call('SET', blob, ARGV[6])
redis.call('HSETNX', record, 'created_at', now)
redis.call('HSET', record, 'v:' .. ARGV[1], ARGV[5], 'active', ARGV[1], 'latest', ARGV[1],
           'basis', ARGV[7], 'base_model_id', ARGV[8], 'updated_at', now, 'checksum', ARGV[11])

-- Remember who published it, so that a repetition is recognised.
if job ~= '' then
  redis.call('HSET', record, job, ARGV[1])
else
  redis.call('HSET', record, 'call', token, 'called', ARGV[1])
end
redis.call('ZADD', index, 0, ARGV[9])
return {'done', ARGV[5]}
"""
)

# KEYS: record, blob of the version. ARGV: version, now, first and last byte of the checksum in the blob.
# Reply: 1, or 0 if there is no such version
_ACTIVATE = Script("""
local record, version = KEYS[1], ARGV[1]
local description = redis.call('HGET', record, 'v:' .. version)
if not description then
  return 0
end
-- Point the record to the version, with the basis and the checksum that belong to it.
local basis = cjson.decode(description).basis_id
local checksum = version .. ':' .. redis.call('GETRANGE', KEYS[2], ARGV[3], ARGV[4])
redis.call('HSET', record, 'active', version, 'basis', basis, 'updated_at', ARGV[2], 'checksum', checksum)
return 1
""")

# KEYS: record, blob of the version. ARGV: version, first and last byte of the checksum in the blob.
# Reply: {basis, checksum}, or nil if this version is no longer the active one
_NOTE_CHECKSUM = Script("""
local known = redis.call('HMGET', KEYS[1], 'active', 'basis')
if known[1] ~= ARGV[1] then
  return false
end
local checksum = redis.call('GETRANGE', KEYS[2], ARGV[2], ARGV[3])
-- pcall: a store that refuses writes still answers.
redis.pcall('HSET', KEYS[1], 'checksum', ARGV[1] .. ':' .. checksum)
return {known[2], checksum}
""")

# KEYS: record, tombstone, index, every blob. ARGV: the latest version that the caller saw, adapter id,
# lifetime of a tombstone in s.
# Reply: 1; 0 if there is no such adapter; -1 if a version was published since the caller looked
_DELETE = Script(
    _TOMBSTONE_FIELDS
    + """
local record, tombstone, index = KEYS[1], KEYS[2], KEYS[3]
local latest = redis.call('HGET', record, 'latest')
if not latest then
  return 0
end
-- A version that the caller has not seen has a blob that is not among the keys.
if latest ~= ARGV[1] then
  return -1
end

-- The new deletion count is the time in ms, so that it still grows after a tombstone has expired.
local now = redis.call('TIME')
local deletion_count = math.max(now[1] * 1000 + math.floor(now[2] / 1000),
                                tonumber(redis.call('HGET', tombstone, COUNT) or 0) + 1)

-- Remove the blobs, the record and the entry in the index.
for i = 4, #KEYS do
  redis.call('UNLINK', KEYS[i])
end
redis.call('DEL', record)
redis.call('ZREM', index, ARGV[2])

-- Leave a tombstone that refuses late publishes and keeps the version number.
redis.call('HSET', tombstone, COUNT, string.format('%.0f', deletion_count), LAST, latest)
redis.call('EXPIRE', tombstone, ARGV[3])
return 1
"""
)


@dataclass(frozen=True)
class PublishTarget:
    """The adapter that a version is published to, and the values that the publication is checked against."""

    tenant: str
    adapter_id: str
    deletion_count: int  # the adapter's when the work on this version began
    base_model_id: str
    token: str  # identifies this one call among its repetitions


async def publish(
    redis: Client, target: PublishTarget, version: AdapterVersion, blob: bytes
) -> AdapterVersion | int:
    """Store and activate `version`. Return the stored version, or the next number if this one is taken.

    Raises `AdapterDeleted` if the adapter was deleted after the target's deletion count was read.
    """
    tenant, adapter_id = target.tenant, target.adapter_id
    names = [
        keys.adapter_record(tenant, adapter_id),
        keys.adapter_blob(tenant, adapter_id, version.version),
        keys.adapter_tombstone(tenant, adapter_id),
        keys.adapter_index(tenant, keys.bucket(adapter_id)),
    ]
    job = "" if version.job_id is None else f"job:{version.job_id}"
    args: list[Argument] = [
        version.version, target.deletion_count, job, target.token, version.to_json(), blob,
        version.basis_id, target.base_model_id, adapter_id, version.created_at,
        b"%d:%b" % (version.version, blob[CHECKSUM]),
    ]  # fmt: skip
    outcome, *rest = await _PUBLISH(redis, keys=names, args=args)
    if outcome == b"deleted":
        raise AdapterDeleted(f"adapter {adapter_id!r} was deleted while this version was made")
    return AdapterVersion.from_json(rest[0]) if outcome == b"done" else int(rest[0])


async def activate(redis: Client, tenant: str, adapter_id: str, version: int, *, now: float) -> bool:
    """Point the adapter's alias to `version`. Return False if there is no such version."""
    names = [keys.adapter_record(tenant, adapter_id), keys.adapter_blob(tenant, adapter_id, version)]
    return bool(await _ACTIVATE(redis, keys=names, args=[version, now, *CHECKSUM_RANGE]))


async def note_checksum(
    redis: Client, tenant: str, adapter_id: str, version: int
) -> tuple[str, bytes] | None:
    """Read basis and checksum of the active version, and add the checksum to a record that lacks it.

    Records of earlier releases lack it. Returns None if `version` is no longer the active one.
    """
    names = [keys.adapter_record(tenant, adapter_id), keys.adapter_blob(tenant, adapter_id, version)]
    reply = await _NOTE_CHECKSUM(redis, keys=names, args=[version, *CHECKSUM_RANGE])
    return None if reply is None else (reply[0].decode(), reply[1])


async def delete(
    redis: Client, tenant: str, adapter_id: str, *, latest: bytes, versions: Sequence[int]
) -> bool | None:
    """Delete all versions and the record.

    Returns False if there is no such adapter, and None if `latest` is no longer the latest version.
    """
    names = [
        keys.adapter_record(tenant, adapter_id),
        keys.adapter_tombstone(tenant, adapter_id),
        keys.adapter_index(tenant, keys.bucket(adapter_id)),
        *(keys.adapter_blob(tenant, adapter_id, version) for version in versions),
    ]
    reply = await _DELETE(redis, keys=names, args=[latest, adapter_id, keys.TOMBSTONE_TTL_S])
    return None if reply < 0 else bool(reply)
