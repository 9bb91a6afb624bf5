"""Bases that belong to tenants: who owns them, what they count against the quota, which adapters need them.

    reserve (quota, owner) → write the factors → use (an adapter) → publish … release (the adapter is deleted)

A basis is named by its bytes, so two tenants may own the same one; each is charged for it, and its factors go
with the last owner. Each step is atomic on one slot; what a crash leaves between two steps is a basis without
an adapter, which its owner sees and can delete. Knows no factors and no adapter records.
"""

from __future__ import annotations

import secrets
from typing import Any

from adapter_core import keys
from adapter_core.basis import BasisManifest
from adapter_core.errors import Conflict, NotFound, QuotaExceeded
from adapter_core.redis_client import Client, Script, translate_errors

#: The owner of a basis that everybody may use although tenants have stored the same bytes.
EVERYBODY = "*"

# A tenant's hash: basis id → "<bytes>:<token>". The token names one life of this ownership, so that the end
# of an earlier life, delayed, does not end the next one. Bytes 0: the factors are about to be deleted.

# KEYS: the tenant's bases. ARGV: basis id, bytes, limit, new token, id of the room that is kept for it or "".
# Reply: the token in force, or the bytes owned already as a number if the limit forbids it.
_RESERVE = Script("""
local owned, limit = redis.call('HGETALL', KEYS[1]), tonumber(ARGV[3])
local total = 0
for i = 1, #owned, 2 do
  local bytes, token = string.match(owned[i + 1], '^(%d+):(.*)$')
  if owned[i] == ARGV[1] and bytes ~= '0' then
    return token
  end
  if owned[i] ~= ARGV[5] then
    total = total + tonumber(bytes)
  end
end
if total + tonumber(ARGV[2]) > limit then
  return total
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ':' .. ARGV[4])
return ARGV[4]
""")

# KEYS: the tenant's bases, the adapters in this one. ARGV: basis id, adapter id, generation. Reply: 1, 0 if
# the tenant does not own it.
_USE = Script("""
local owned = redis.call('HGET', KEYS[1], ARGV[1])
if not owned or string.sub(owned, 1, 2) == '0:' then
  return 0
end
local known = tonumber(redis.call('HGET', KEYS[2], ARGV[2]) or -1)
if known < tonumber(ARGV[3]) then
  redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
end
return 1
""")

# KEYS: the tenant's bases, the adapters in this one. ARGV: basis id, adapter id or "", generation. Reply: the
# token of the life that ends, false if it goes on or there is none. An adapter that was published again since
# has another generation, and keeps the basis.
_RELEASE = Script("""
local owned = redis.call('HGET', KEYS[1], ARGV[1])
if not owned then
  return false
end
if ARGV[2] ~= '' then
  local known = redis.call('HGET', KEYS[2], ARGV[2])
  if not known and string.sub(owned, 1, 2) ~= '0:' then
    return false
  end
  if known and tonumber(known) < tonumber(ARGV[3]) then
    redis.call('HDEL', KEYS[2], ARGV[2])
  end
end
if redis.call('HLEN', KEYS[2]) > 0 then
  return false
end
local token = string.match(owned, '^%d+:(.*)$')
redis.call('HSET', KEYS[1], ARGV[1], '0:' .. token)
return token
""")

# KEYS: the tenant's bases. ARGV: basis id, token.
_FORGET = Script("""
if redis.call('HGET', KEYS[1], ARGV[1]) == '0:' .. ARGV[2] then
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return 1
""")

# KEYS: the basis' owners, its manifest. ARGV: tenant, token. Reply: 1, 0 if it is everybody's.
_OWN = Script("""
if redis.call('EXISTS', KEYS[1]) == 0 and redis.call('EXISTS', KEYS[2]) == 1 then
  return 0
end
if redis.call('HEXISTS', KEYS[1], '*') == 1 then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
""")

# KEYS: the basis' owners, manifest, preconditioner, step, every module. ARGV: tenant, token.
_DISOWN = Script("""
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
if redis.call('EXISTS', KEYS[1]) == 0 then
  for i = 2, #KEYS do
    redis.call('UNLINK', KEYS[i])
  end
end
return 1
""")


class OwnBases:
    """Whose the bases are. max_bytes: what one tenant may own, all factors together.

    Every method raises `StoreUnavailable`, those that write also `StoreFull`.
    """

    def __init__(self, redis: Client, *, max_bytes: int) -> None:
        self._redis = redis
        self.max_bytes = max_bytes

    async def reserve(self, tenant: str, manifest: BasisManifest, *, room_id: str = "") -> bool:
        """Make the tenant an owner, before the factors are written. False: it is stored and everybody's.

        room_id: of `keep_room`; the basis takes that room. Repeating it changes nothing. Raises
        `QuotaExceeded`; nothing has changed then.
        """
        basis_id = manifest.basis_id
        if await self._is_everybodys(basis_id):
            return False
        reply = await self._claim(tenant, basis_id, manifest.stored_bytes, room_id)
        names = [keys.basis_owners(basis_id), keys.basis_manifest(basis_id)]
        if await _OWN(self._redis, keys=names, args=[tenant, reply]):
            return True
        await self._forget(tenant, basis_id, reply.decode())
        return False

    async def keep_room(self, tenant: str, room_id: str, num_bytes: int) -> None:
        """Count a basis that is yet to be made, under an id that no basis has, until that is released.

        It is used and released like a basis. Repeating it changes nothing. Raises `QuotaExceeded`.
        """
        await self._claim(tenant, room_id, num_bytes, "")

    async def use(self, tenant: str, basis_id: str, adapter_id: str, *, generation: int) -> None:
        """Note, before it is published, that a version of the adapter is in this basis.

        generation: what the publish will be fenced by. A basis that is everybody's needs no note. Raises
        `Conflict` if the basis has been deleted since.
        """
        if await self._is_everybodys(basis_id):
            return
        names = [keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id)]
        if not await _USE(self._redis, keys=names, args=[basis_id, adapter_id, generation]):
            raise Conflict(f"basis {basis_id} has been deleted", code="basis_deleted", param="basis_id")

    async def release(self, tenant: str, adapter_id: str, *, generation: int) -> list[str]:
        """After an adapter was deleted, giving `generation`: delete the bases that no adapter needs any more.

        Gives their ids. Also finishes deletions that were cut off.
        """
        deleted = []
        for basis_id in await self.of_tenant(tenant, dying=True):
            if await self._drop(tenant, basis_id, adapter_id, generation):
                deleted.append(basis_id)
        return deleted

    async def delete(self, tenant: str, basis_id: str) -> None:
        """Raises `NotFound` if the tenant does not own it, `Conflict` while adapters are in it."""
        if basis_id not in await self.of_tenant(tenant):
            raise basis_not_found(basis_id)
        if not await self._drop(tenant, basis_id, "", 0):
            users = await self.users(tenant, basis_id)
            named = ", ".join(sorted(users)[:5])
            raise Conflict(
                f"basis {basis_id} is needed by {len(users)} adapter(s), {named}: delete them first",
                code="basis_in_use",
                param="basis_id",
            )

    async def discard(self, tenant: str, basis_id: str) -> None:
        """Delete a basis of the tenant's that no adapter is in; else do nothing."""
        await self._drop(tenant, basis_id, "", 0)

    async def of_tenant(self, tenant: str, *, dying: bool = False) -> dict[str, int]:
        """The tenant's bases with their bytes; with `dying` also those whose deletion was cut off."""
        with translate_errors():
            owned: Any = await self._redis.hgetall(keys.tenant_bases(tenant))
        found = {basis_id.decode(): int(value.split(b":")[0]) for basis_id, value in owned.items()}
        return {basis_id: size for basis_id, size in found.items() if size or dying}

    async def users(self, tenant: str, basis_id: str) -> set[str]:
        """The tenant's adapters that are in this basis of its own."""
        with translate_errors():
            names: Any = await self._redis.hkeys(keys.basis_users(tenant, basis_id))
        return {name.decode() for name in names}

    async def check_access(self, tenant: str, basis_id: str) -> None:
        """Raises `NotFound` for a basis that belongs to others only, as for one that does not exist."""
        if not keys.BASIS_ID.fullmatch(basis_id):
            raise basis_not_found(basis_id)
        with translate_errors():
            owners: Any = await self._redis.hkeys(keys.basis_owners(basis_id))
        if owners and not {tenant.encode(), EVERYBODY.encode()} & set(owners):
            raise basis_not_found(basis_id)

    async def _is_everybodys(self, basis_id: str) -> bool:
        with translate_errors():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.exists(keys.basis_manifest(basis_id))
            pipeline.hkeys(keys.basis_owners(basis_id))
            is_stored, owners = await pipeline.execute()
        return bool(is_stored) and (not owners or EVERYBODY.encode() in owners)

    async def _claim(self, tenant: str, basis_id: str, size: int, room_id: str) -> bytes:
        """The token in force."""
        reply: bytes | int = await _RESERVE(
            self._redis,
            keys=[keys.tenant_bases(tenant)],
            args=[basis_id, size, self.max_bytes, secrets.token_hex(8), room_id],
        )
        if isinstance(reply, int):
            raise QuotaExceeded(
                f"a basis of {size} bytes and the {reply} bytes of your other bases exceed "
                f"{self.max_bytes} bytes; delete bases, or adapters that have bases of their own"
            )
        return reply

    async def _drop(self, tenant: str, basis_id: str, adapter_id: str, generation: int) -> bool:
        """Take the adapter out of the basis, and the basis out of the store if it was the last."""
        names = [keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id)]
        token: Any = await _RELEASE(self._redis, keys=names, args=[basis_id, adapter_id, generation])
        if token is None:
            return False
        with translate_errors():
            text: Any = await self._redis.get(keys.basis_manifest(basis_id))
        count = 0 if text is None else len(BasisManifest.from_json(text).modules)
        stored = [
            keys.basis_owners(basis_id),
            keys.basis_manifest(basis_id),
            keys.basis_preconditioner(basis_id),
            keys.basis_step(basis_id),
            *(keys.basis_module(basis_id, index) for index in range(count)),
        ]
        await _DISOWN(self._redis, keys=stored, args=[tenant, token])
        await self._forget(tenant, basis_id, token.decode())
        return True

    async def _forget(self, tenant: str, basis_id: str, token: str) -> None:
        await _FORGET(self._redis, keys=[keys.tenant_bases(tenant)], args=[basis_id, token])


def basis_not_found(basis_id: str) -> NotFound:
    return NotFound(f"there is no basis {basis_id!r}", param="basis_id", code="basis_not_found")
