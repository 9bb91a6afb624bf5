"""The intermediate states of a training job as models: bounded in number, and gone with the job's record.

They lie beside the adapter's versions and change nothing about those: neither the active version nor the next
number. Each is an adapter in the packed form, whose version number says the step (`adapter_ref.py`). A hash
per adapter describes them by step; all belong to the adapter's newest job that has any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tessera.errors import AdapterDeleted
from tessera.formats.adapter_ref import CHECKSUM, checkpoint_version
from tessera.redis import keys
from tessera.redis.client import Client, Script, translate_errors
from tessera.store.adapter_scripts import AdapterVersion

if TYPE_CHECKING:
    import torch

    from tessera.formats.adapter import Adapter

# KEYS: checkpoints of the adapter, blob, tombstone
# ARGV: step, deletion count, description, blob, job id, how many to keep, lifetime in s, prefix of the blobs,
#       version number of step 0
# Reply: "done", "deleted", or "newer" if a later job has checkpoints
_PUT = Script(f"""
local COUNT = '{keys.TOMBSTONE_COUNT}'
local checkpoints, blob, tombstone = KEYS[1], KEYS[2], KEYS[3]
local step, job, keep, lifetime, prefix, zero = ARGV[1], ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9]

local function blob_of(number) return prefix .. string.format('%.0f', zero + number) end
local function drop(number)
  redis.call('UNLINK', blob_of(number))
  redis.call('HDEL', checkpoints, number)
end

-- Refuse work that began before the adapter was deleted.
if tonumber(ARGV[2]) < tonumber(redis.call('HGET', tombstone, COUNT) or 0) then
  return 'deleted'
end

-- The states of an earlier job make room; those of a later one stay. Ids of jobs sort by time.
local steps = {{}}
local known = redis.call('HGETALL', checkpoints)
for i = 1, #known, 2 do
  local owner = cjson.decode(known[i + 1]).job_id
  if owner > job then
    return 'newer'
  elseif owner < job then
    drop(known[i])
  elseif known[i] ~= step then
    steps[#steps + 1] = tonumber(known[i])
  end
end

redis.call('SET', blob, ARGV[4])
redis.call('HSET', checkpoints, step, ARGV[3])
steps[#steps + 1] = tonumber(step)

-- Keep the latest steps, all as long as the newest.
table.sort(steps)
for index, number in ipairs(steps) do
  if index <= #steps - keep then
    drop(string.format('%.0f', number))
  else
    redis.call('EXPIRE', blob_of(number), lifetime)
  end
end
redis.call('EXPIRE', checkpoints, lifetime)
return 'done'
""")

# KEYS: checkpoints of the adapter. ARGV: job id or "" for all, step or "" for all, prefix of the blobs,
# version number of step 0. Reply: how many were deleted
_DROP = Script("""
local dropped = 0
local known = redis.call('HGETALL', KEYS[1])
for i = 1, #known, 2 do
  local is_meant = (ARGV[1] == '' or cjson.decode(known[i + 1]).job_id == ARGV[1])
                   and (ARGV[2] == '' or known[i] == ARGV[2])
  if is_meant then
    redis.call('UNLINK', ARGV[3] .. string.format('%.0f', ARGV[4] + known[i]))
    redis.call('HDEL', KEYS[1], known[i])
    dropped = dropped + 1
  end
end
return dropped
""")


class CheckpointStore:
    """The checkpoints of all adapters. Every method raises `StoreUnavailable`, `put` also `StoreFull`."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis

    async def put(
        self,
        tenant: str,
        adapter_id: str,
        adapter: Adapter,
        *,
        step: int,
        job_id: str,
        created_at: float,
        dtype: torch.dtype,
        deletion_count: int,
        keep: int,
    ) -> bool:
        """Store the state after `step` of a job. Returns False if a later job of this adapter has states.

        keep: how many states of the job stay; earlier steps are dropped. Repeating the call changes nothing.
        Raises `AdapterDeleted` if the adapter was deleted since `deletion_count`, `InvalidInput` if values
        do not fit dtype.
        """
        version = checkpoint_version(step)
        blob = adapter.to_bytes(version=version, dtype=dtype)
        described = AdapterVersion(
            version=version,
            created_at=created_at,
            bytes=len(blob),
            basis_id=adapter.basis_id,
            rank=adapter.rank,
            dtype=str(dtype).removeprefix("torch."),
            job_id=job_id,
            metadata={**adapter.metadata, "checksum": blob[CHECKSUM].hex()},
        )
        names = [
            keys.adapter_checkpoints(tenant, adapter_id),
            keys.adapter_blob(tenant, adapter_id, version),
            keys.adapter_tombstone(tenant, adapter_id),
        ]
        prefix = f"{keys.adapter_record(tenant, adapter_id)}:"
        reply = await _PUT(
            self._redis,
            keys=names,
            args=[
                step, deletion_count, described.to_json(), blob, job_id, keep, keys.JOB_TTL_S, prefix,
                checkpoint_version(0),
            ],
        )  # fmt: skip
        if reply == b"deleted":
            raise AdapterDeleted(f"adapter {adapter_id!r} was deleted while this state was made")
        return bool(reply == b"done")

    async def of_adapter(self, tenant: str, adapter_id: str) -> Sequence[AdapterVersion]:
        """Return the descriptions of all checkpoints of an adapter, latest step first."""
        with translate_errors():
            known: Any = await self._redis.hgetall(keys.adapter_checkpoints(tenant, adapter_id))
        found = [AdapterVersion.from_json(text) for text in known.values()]
        return sorted(found, key=lambda version: -version.version)

    async def drop(
        self, tenant: str, adapter_id: str, *, job_id: str | None = None, step: int | None = None
    ) -> int:
        """Delete the checkpoints of an adapter, or those of one job or step. Returns how many there were."""
        names = [keys.adapter_checkpoints(tenant, adapter_id)]
        prefix = f"{keys.adapter_record(tenant, adapter_id)}:"
        dropped: int = await _DROP(
            self._redis,
            keys=names,
            args=[job_id or "", "" if step is None else step, prefix, checkpoint_version(0)],
        )
        return dropped
