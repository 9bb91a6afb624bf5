"""Private bases: who owns them, how many bytes count against a tenant's quota, which adapters use them.

    reserve (quota, owner) → write the factors → use (an adapter) → publish … release (the adapter is deleted)

The id of a basis is a digest of its bytes, so two tenants may own the same basis. Each is charged for it, and
its factors are deleted with the last owner. Each step is atomic on one slot. A crash between two steps leaves
a basis without an adapter, which its owner sees and can delete. This module knows no factors and no adapter
records.
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

#: Listed as an owner of a shared basis of which tenants have stored the same bytes.
EVERYBODY = "*"


@dataclass(frozen=True)
class Ownership:
    """One lifetime of a tenant's private basis. Its factors can be written only while it lasts."""

    tenant: str
    token: str  # identifies this lifetime


class PrivateBases:
    """The private bases of all tenants and their users.

    Every method raises `StoreUnavailable`; methods that write also raise `StoreFull`.
    """

    def __init__(self, redis: Client, *, max_bytes: int) -> None:
        self._redis = redis
        #: Quota of one tenant, for the factors of all its private bases together.
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
        """Make the tenant an owner of the basis before its factors are written.

        Returns None if the basis is stored and shared. Repeating the call changes nothing.

        reservation_id: id of an earlier `reserve_quota` that this basis takes over. user: a name that uses
        the basis (as with `use`) from the same moment on, so that a release by another user cannot delete it
        in between. recipe_keys: names under which `BasisHolds.find` finds the basis. Raises `QuotaExceeded`,
        in which case nothing has changed.
        """
        basis_id = manifest.basis_id
        if await self._is_shared(basis_id):
            return None
        # The token carries the number of modules, so that a deletion finds those of a half-written basis.
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
        """Charge the tenant for a basis that will be made later, until the reservation is released.

        reservation_id must differ from every basis id. A reservation is used and released like a basis.
        Repeating the call changes nothing. Raises `QuotaExceeded`.
        """
        await self._claim(
            tenant, reservation_id, num_bytes, f"{secrets.token_hex(8)}.0", "", user, deletion_count
        )

    async def use(self, tenant: str, basis_id: str, adapter_id: str, *, deletion_count: int) -> None:
        """Note that the adapter uses this basis, before a version in it is published.

        A shared basis needs no note. deletion_count: the count that the publish will be checked against.
        Raises `BasisDeleted`.
        """
        if await self._is_shared(basis_id):
            return
        names = [keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id)]
        if not await ownership_scripts.USE(
            self._redis, keys=names, args=[basis_id, adapter_id, deletion_count]
        ):
            raise BasisDeleted(f"basis {basis_id} has been deleted", param="basis_id")

    async def release(self, tenant: str, adapter_id: str, *, deletion_count: int) -> list[str]:
        """After an adapter was deleted, delete the bases that nothing uses any more, and return their ids.

        deletion_count: the adapter's count, read after the deletion. Interrupted deletions are finished too.
        """
        deleted = []
        for basis_id in await self.of_tenant(tenant, include_deleting=True):
            if await self._release(tenant, basis_id, adapter_id, deletion_count):
                deleted.append(basis_id)
        return deleted

    async def delete(self, tenant: str, basis_id: str) -> None:
        """Delete the tenant's basis. Raises `NotFound` if it has none, `Conflict` while adapters use it."""
        if basis_id not in await self.of_tenant(tenant):
            raise basis_not_found(basis_id)
        if not await self.discard(tenant, basis_id):
            users = await self.users(tenant, basis_id)
            first_names = ", ".join(sorted(users)[:5])
            raise Conflict(
                f"basis {basis_id} is used by {len(users)} adapter(s), {first_names}: delete them first",
                code="basis_in_use",
                param="basis_id",
            )

    async def discard(self, tenant: str, basis_id: str, *, pin: str = "") -> bool:
        """Delete the tenant's basis if nothing but `pin` uses it. Return False if something else does."""
        names = [keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id)]
        token: Any = await ownership_scripts.END(self._redis, keys=names, args=[basis_id, pin])
        if token:
            await self._delete_stored(tenant, basis_id, token.decode())
        return token is not None

    async def of_tenant(self, tenant: str, *, include_deleting: bool = False) -> dict[str, int]:
        """Return the bytes of each private basis of the tenant.

        include_deleting: also list bases with an interrupted deletion, with 0 bytes.
        """
        with translate_errors():
            owned: Any = await self._redis.hgetall(keys.tenant_bases(tenant))
        found = {basis_id.decode(): int(value.split(b":")[0]) for basis_id, value in owned.items()}
        return {basis_id: size for basis_id, size in found.items() if size or include_deleting}

    async def users(self, tenant: str, basis_id: str) -> set[str]:
        """Return what uses this private basis: names of adapters, and of holds (`holds.py`)."""
        with translate_errors():
            names: Any = await self._redis.hkeys(keys.basis_users(tenant, basis_id))
        return {name.decode() for name in names}

    async def check_access(self, tenant: str, basis_id: str) -> None:
        """Raise `NotFound` if the basis belongs to other tenants only, as if it did not exist."""
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
        """Return the token in force: `token`, or that of a lifetime that goes on.

        more: the remaining arguments of the script `RESERVE`.
        """
        reply: bytes | int = await ownership_scripts.RESERVE(
            self._redis,
            keys=[keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id), keys.tenant_recipes(tenant)],
            args=[basis_id, num_bytes, self.max_bytes, token, *more],
        )
        if isinstance(reply, int):
            raise quota_exceeded(num_bytes, reply, self.max_bytes)
        return reply.decode()

    async def _release(self, tenant: str, basis_id: str, user: str, deletion_count: int) -> bool:
        """Remove the user from the basis, and the basis from the store if that was its last user."""
        names = [keys.tenant_bases(tenant), keys.basis_users(tenant, basis_id)]
        token: Any = await ownership_scripts.RELEASE(
            self._redis, keys=names, args=[basis_id, user, deletion_count]
        )
        if token is None:
            return False
        await self._delete_stored(tenant, basis_id, token.decode())
        return True

    async def _delete_stored(self, tenant: str, basis_id: str, token: str) -> None:
        """After a lifetime has ended, delete the factors unless others own them, then the ownership."""
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
        _, _, num_modules = token.partition(".")
        if num_modules:
            return int(num_modules)
        with translate_errors():  # tokens of earlier releases do not carry the number
            text: Any = await self._redis.get(keys.basis_manifest(basis_id))
        return 0 if text is None else len(BasisManifest.from_json(text).modules)


def quota_exceeded(
    num_bytes: int, owned_bytes: int, max_bytes: int, *, param: str | None = None
) -> QuotaExceeded:
    """Return the error for a private basis that exceeds the tenant's quota."""
    return QuotaExceeded(
        f"a basis of {num_bytes} bytes and the {owned_bytes} bytes of your other bases exceed "
        f"{max_bytes} bytes; delete bases, or adapters that have a private basis",
        param=param,
    )


def basis_not_found(basis_id: str) -> NotFound:
    return NotFound(f"there is no basis {basis_id!r}", param="basis_id", code="basis_not_found")
