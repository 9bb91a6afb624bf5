"""Holds: what keeps a private basis in the store besides the adapters that use it.

    job     holds the basis from the moment it has it until the job ends, so that nothing deletes it meanwhile
    pin     keeps a basis that its owner had built by a job, until the owner deletes it

Both are users of the basis in `ownership.py`, under names that no adapter can have. A worker that dies during
the last attempt at a job leaves a stale hold, which is dropped when the tenant needs the quota. This module
also finds the basis that a recipe has given, so that nothing is built twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tessera.errors import BasisDeleted, Conflict, QuotaExceeded
from tessera.formats.manifest import BasisManifest
from tessera.queue.records import OWN_DATA, JobStatus
from tessera.redis import keys
from tessera.redis.client import Client, translate_errors
from tessera.store.ownership import Ownership, PrivateBases, basis_not_found, quota_exceeded

_JOB, _PIN = "job:", "pin:"
#: A hold is never deleted like an adapter, so its deletion count is 0 while it lasts and 1 when it ends.
_HELD, _ENDED = 0, 1


def source_key(
    method: str,
    rank: int,
    *,
    options: Mapping[str, Any],
    target_modules: Sequence[str] | None,
    calibration: str | None,
    sha256: str,
    rank_pattern: Mapping[str, int] | None = None,
) -> str:
    """Name a recipe by the file that it reads, not by the tokens in that file.

    With this name a process that does not encode text can tell whether a basis of the recipe is stored.
    sha256: digest of the file, "" if the recipe reads none.
    """
    data = OWN_DATA if calibration == OWN_DATA else "file"
    parts = [method, rank, dict(options), sorted(set(target_modules or [])), data, sha256]
    if rank_pattern:
        parts.append(dict(rank_pattern))
    return f"source:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"


class BasisHolds:
    """The holds of all tenants on their private bases. Every method raises `StoreUnavailable`."""

    def __init__(self, redis: Client, private_bases: PrivateBases) -> None:
        self._redis, self._private_bases = redis, private_bases

    async def find(self, tenant: str, recipe_key: str) -> str | None:
        """Return the id of the tenant's private basis of this recipe, None if there is none."""
        with translate_errors():
            found: Any = await self._redis.hget(keys.tenant_recipes(tenant), recipe_key)
        if found is None or found.decode() not in await self._private_bases.of_tenant(tenant):
            return None
        return str(found.decode())

    async def hold_found(self, tenant: str, recipe_key: str, job_id: str) -> str | None:
        """Hold the tenant's private basis of this recipe for a job, and return its id.

        Returns None if there is no such basis, or if it was deleted first. Hold a basis before reading it:
        one that is held cannot be deleted.
        """
        basis_id = await self.find(tenant, recipe_key)
        if basis_id is None:
            return None
        try:
            await self.hold(tenant, basis_id, job_id)
        except BasisDeleted:
            return None
        return basis_id

    async def reserve(
        self,
        tenant: str,
        manifest: BasisManifest,
        job_id: str,
        *,
        reservation_id: str = "",
        recipe_keys: Sequence[str] = (),
    ) -> Ownership | None:
        """Call `PrivateBases.reserve`, and hold the basis for the job in the same step.

        The same bytes may be the basis of another job, which would delete it at its end unless this job holds
        it as well.
        """
        return await self._private_bases.reserve(
            tenant,
            manifest,
            reservation_id=reservation_id,
            user=_JOB + job_id,
            deletion_count=_HELD,
            recipe_keys=recipe_keys,
        )

    async def reserve_quota(self, tenant: str, reservation_id: str, num_bytes: int, job_id: str) -> None:
        """Reserve quota for the job's result until the job has ended. Raises `QuotaExceeded`."""
        user = _JOB + job_id
        try:
            await self._private_bases.reserve_quota(
                tenant, reservation_id, num_bytes, user=user, deletion_count=_HELD
            )
        except QuotaExceeded:
            await self.drop_stale(tenant)
            await self._private_bases.reserve_quota(
                tenant, reservation_id, num_bytes, user=user, deletion_count=_HELD
            )

    async def hold(self, tenant: str, basis_id: str, job_id: str) -> None:
        """Keep the basis while the job lasts. A shared basis needs no hold. Raises `BasisDeleted`."""
        await self._private_bases.use(tenant, basis_id, _JOB + job_id, deletion_count=_HELD)

    async def let_go(self, tenant: str, job_id: str) -> None:
        """Drop the holds of a job that has ended, and delete the bases that nothing else keeps."""
        await self._private_bases.release(tenant, _JOB + job_id, deletion_count=_ENDED)

    async def pin(self, tenant: str, basis_id: str) -> None:
        """Keep the basis until its owner calls `delete`. Raises `BasisDeleted`."""
        await self._private_bases.use(tenant, basis_id, _PIN + basis_id, deletion_count=_HELD)

    async def delete(self, tenant: str, basis_id: str) -> None:
        """Delete the tenant's basis and its pin.

        Raises `NotFound` if the tenant does not own it, `Conflict` while adapters or jobs use it.
        """
        if basis_id not in await self._private_bases.of_tenant(tenant):
            raise basis_not_found(basis_id)
        await self.drop_stale(tenant)
        pin = _PIN + basis_id
        while not await self._private_bases.discard(tenant, basis_id, pin=pin):
            users = await self._private_bases.users(tenant, basis_id) - {pin}
            if users:
                first_names = ", ".join(sorted(name.removeprefix(_JOB) for name in users)[:5])
                message = f"basis {basis_id} is used by {len(users)} adapter(s) or job(s): {first_names}"
                raise Conflict(message, code="basis_in_use", param="basis_id")

    async def check_quota(self, tenant: str, num_bytes: int) -> None:
        """Raise `QuotaExceeded` if the tenant has no quota left for a basis of this size."""
        max_bytes = self._private_bases.max_bytes
        if await self._owned_bytes(tenant) + num_bytes <= max_bytes:
            return
        await self.drop_stale(tenant)
        owned_bytes = await self._owned_bytes(tenant)
        if owned_bytes + num_bytes > max_bytes:
            raise quota_exceeded(num_bytes, owned_bytes, max_bytes, param="adapter.basis")

    async def drop_stale(self, tenant: str) -> None:
        """Drop the holds of jobs that have ended without dropping them, because their worker died."""
        for basis_id in await self._private_bases.of_tenant(tenant):
            with translate_errors():
                cursor = self._redis.hscan_iter(keys.basis_users(tenant, basis_id), match=f"{_JOB}*")
                held = [name.decode().removeprefix(_JOB) async for name, _ in cursor]
            for job_id in held:
                if await self._has_ended(job_id):
                    await self.let_go(tenant, job_id)

    async def _has_ended(self, job_id: str) -> bool:
        with translate_errors():
            status: Any = await self._redis.hget(keys.job_record(job_id), "status")
        return status is None or JobStatus(status.decode()).is_final

    async def _owned_bytes(self, tenant: str) -> int:
        return sum((await self._private_bases.of_tenant(tenant)).values())
