"""Bases that belong to tenants: who owns them, what they count against the quota, which adapters need them.

    reserve (quota, owner) → write the factors → use (an adapter) → publish … release (the adapter is deleted)

A basis is named by its bytes, so two tenants may own the same one; each is charged for it, and its factors go
with the last owner. Each step is atomic on one slot; what a crash leaves between two steps is a basis without
an adapter, which its owner sees and can delete. Knows no factors and no adapter records.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.errors import BasisDeleted, Conflict, NotFound, QuotaExceeded
from tessera.formats.manifest import BasisManifest
from tessera.redis import keys
from tessera.redis.client import Client, translate_errors
from tessera.store import ownership_scripts

#: The owner of a basis that everybody may use although tenants have stored the same bytes.
EVERYBODY = "*"


@dataclass(frozen=True)
class Ownership:
    """One life of a basis as a tenant's own. Writes of its factors name it, and are refused after its end."""

    tenant: str
    token: str


class PrivateBases:
    """Whose the bases are. max_bytes: what one tenant may own, all factors together.

    Every method raises `StoreUnavailable`, those that write also `StoreFull`.
    """

    def __init__(self, redis: Client, *, max_bytes: int) -> None:
        self._redis = redis
        self.max_bytes = max_bytes

    async def reserve(
        self,
        tenant: str,
        manifest: BasisManifest,
        *,
        reservation_id: str = "",
        user: str = "",
        deletion_count: int = 0,
        recipe_keys: Sequence[str] = (),
    ) -> Ownership | None:
        """Make the tenant an owner, before the factors are written. None: it is stored and everybody's.

        reservation_id: that of an earlier `reserve_quota`, whose bytes the basis takes over. user: a name
        that uses the basis (as with `use`) from the same moment on, so that no release of another user
        deletes it in between. recipe_keys: names under which `BasisHolds.find` finds it. Repeating it changes
        nothing. Raises `QuotaExceeded`; nothing has changed then.
        """
        basis_id = manifest.basis_id
        if await self._is_shared(basis_id):
            return None
        # The number of modules goes with the token, so that a deletion finds those of a half-written basis.
        token = await self._claim(
            tenant, basis_id, manifest.stored_bytes, f"{secrets.token_hex(8)}.{len(manifest.modules)}",
            reservation_id, user, deletion_count, *recipe_keys,
        )  # fmt: skip
        names = [keys.basis_owners(basis_id), keys.basis_manifest(basis_id)]
        if await ownership_scripts.OWN(self._redis, keys=names, args=[tenant, token]):
            return Ownership(tenant, token)
        if user:
            await self._release(tenant, basis_id, user, deletion_count + 1)
        else:
            await self.discard(tenant, basis_id)
        return None

    async def reserve_quota(
        self, tenant: str, reservation_id: str, num_bytes: int, *, user: str = "", deletion_count: int = 0
    ) -> None:
        """Count a basis that is yet to be made, under an id that no basis has, until that is released.

        It is used and released like a basis. Repeating it changes nothing. Raises `QuotaExceeded`.
        """
        await self._claim(
            tenant, reservation_id, num_bytes, f"{secrets.token_hex(8)}.0", "", user, deletion_count
        )

    async def use(self, tenant: str, basis_id: str, adapter_id: str, *, deletion_count: int) -> None:
        """Note, before it is published, that a version of the adapter is in this basis.

        deletion_count: the one that the publish will be checked against. A basis that is everybody's needs no
        note. Raises `BasisDeleted`.
        """
        if await self._is_shared(basis_id):
            return
        names = [keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id)]
        if not await ownership_scripts.USE(
            self._redis, keys=names, args=[basis_id, adapter_id, deletion_count]
        ):
            raise BasisDeleted(f"basis {basis_id} has been deleted", param="basis_id")

    async def release(self, tenant: str, adapter_id: str, *, deletion_count: int) -> list[str]:
        """After an adapter was deleted: delete the bases that no adapter needs any more; return their ids.

        deletion_count: the adapter's, read after the deletion. Also finishes deletions that were cut off.
        """
        deleted = []
        for basis_id in await self.of_tenant(tenant, dying=True):
            if await self._release(tenant, basis_id, adapter_id, deletion_count):
                deleted.append(basis_id)
        return deleted

    async def delete(self, tenant: str, basis_id: str) -> None:
        """Raises `NotFound` if the tenant does not own it, `Conflict` while adapters are in it."""
        if basis_id not in await self.of_tenant(tenant):
            raise basis_not_found(basis_id)
        if not await self.discard(tenant, basis_id):
            users = await self.users(tenant, basis_id)
            named = ", ".join(sorted(users)[:5])
            raise Conflict(
                f"basis {basis_id} is needed by {len(users)} adapter(s), {named}: delete them first",
                code="basis_in_use",
                param="basis_id",
            )

    async def discard(self, tenant: str, basis_id: str, *, pin: str = "") -> bool:
        """Delete a basis of the tenant's that nothing uses, or only `pin`. False: something else does."""
        names = [keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id)]
        token: Any = await ownership_scripts.END(self._redis, keys=names, args=[basis_id, pin])
        if token:
            await self._delete_stored(tenant, basis_id, token.decode())
        return token is not None

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

    async def _is_shared(self, basis_id: str) -> bool:
        with translate_errors():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.exists(keys.basis_manifest(basis_id))
            pipeline.hkeys(keys.basis_owners(basis_id))
            is_stored, owners = await pipeline.execute()
        return bool(is_stored) and (not owners or EVERYBODY.encode() in owners)

    async def _claim(self, tenant: str, basis_id: str, num_bytes: int, token: str, *more: str | int) -> str:
        """The token in force: `token`, or that of the life that goes on. more: the rest for `RESERVE`."""
        reply: bytes | int = await ownership_scripts.RESERVE(
            self._redis,
            keys=[keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id), keys.tenant_recipes(tenant)],
            args=[basis_id, num_bytes, self.max_bytes, token, *more],
        )
        if isinstance(reply, int):
            raise quota_exceeded(num_bytes, reply, self.max_bytes)
        return reply.decode()

    async def _release(self, tenant: str, basis_id: str, user: str, deletion_count: int) -> bool:
        """Take the user out of the basis, and the basis out of the store if it was the last."""
        names = [keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id)]
        token: Any = await ownership_scripts.RELEASE(
            self._redis, keys=names, args=[basis_id, user, deletion_count]
        )
        if token is None:
            return False
        await self._delete_stored(tenant, basis_id, token.decode())
        return True

    async def _delete_stored(self, tenant: str, basis_id: str, token: str) -> None:
        """After the end of a life was noted: delete the factors unless others own them, then the note."""
        stored = [
            keys.basis_owners(basis_id),
            keys.basis_manifest(basis_id),
            keys.basis_preconditioner(basis_id),
            keys.basis_step(basis_id),
            *(keys.basis_module(basis_id, i) for i in range(await self._num_modules(basis_id, token))),
        ]
        await ownership_scripts.DISOWN(self._redis, keys=stored, args=[tenant, token])
        await ownership_scripts.FORGET(self._redis, keys=[keys.tenant_bases(tenant)], args=[basis_id, token])

    async def _num_modules(self, basis_id: str, token: str) -> int:
        _, _, noted = token.partition(".")
        if noted:
            return int(noted)
        with translate_errors():  # the token is of an earlier release
            text: Any = await self._redis.get(keys.basis_manifest(basis_id))
        return 0 if text is None else len(BasisManifest.from_json(text).modules)


def quota_exceeded(
    num_bytes: int, owned_bytes: int, max_bytes: int, *, param: str | None = None
) -> QuotaExceeded:
    return QuotaExceeded(
        f"a basis of {num_bytes} bytes and the {owned_bytes} bytes of your other bases exceed "
        f"{max_bytes} bytes; delete bases, or adapters that have bases of their own",
        param=param,
    )


def basis_not_found(basis_id: str) -> NotFound:
    return NotFound(f"there is no basis {basis_id!r}", param="basis_id", code="basis_not_found")
