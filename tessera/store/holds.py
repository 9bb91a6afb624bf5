"""What keeps a tenant's own basis beside the adapters in it: a job that works with it, or its owner's wish.

    job     from the moment that it has the basis until it ends; so nothing deletes the basis under it
    pin     a basis that its owner had built by a job of its own stays until its owner deletes it

Both are users of the basis in `ownership.py`, under names that no adapter can have. What a worker leaves when
it dies with a job's last attempt is found and dropped when somebody wants the room. Also remembers from which
recipe a tenant's basis was made, so that nothing is built twice.
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
) -> str:
    """A name for a recipe by the file that it reads instead of the tokens in it.

    For processes that do not encode: whether a basis of this recipe is stored already. sha256: of the file,
    "" if none is read.
    """
    data = OWN_DATA if calibration == OWN_DATA else "file"
    parts = [method, rank, dict(options), sorted(set(target_modules or [])), data, sha256]
    return f"source:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"


class BasisHolds:
    """The holds of all tenants on their own bases. Every method raises `StoreUnavailable`."""

    def __init__(self, redis: Client, private_bases: PrivateBases) -> None:
        self._redis, self._private_bases = redis, private_bases

    async def find(self, tenant: str, recipe_key: str) -> str | None:
        """The tenant's own basis of this recipe."""
        with translate_errors():
            found: Any = await self._redis.hget(keys.tenant_recipes(tenant), recipe_key)
        if found is None or found.decode() not in await self._private_bases.of_tenant(tenant):
            return None
        return str(found.decode())

    async def hold_found(self, tenant: str, recipe_key: str, job_id: str) -> str | None:
        """Hold the tenant's own basis of this recipe for a job, and give its id.

        None if there is none, or if its deletion came first. A basis that is held is not deleted, so it is to
        be held before it is read.
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
        """`PrivateBases.reserve`, and hold the basis for the job in the same step: equal bytes may belong to
        another job's basis, which ends with that job unless this one holds it."""
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
        """Keep the basis for a job. One that is everybody's needs none. Raises `BasisDeleted`."""
        await self._private_bases.use(tenant, basis_id, _JOB + job_id, deletion_count=_HELD)

    async def let_go(self, tenant: str, job_id: str) -> None:
        """The job has ended: the bases that nothing else keeps are deleted."""
        await self._private_bases.release(tenant, _JOB + job_id, deletion_count=_ENDED)

    async def pin(self, tenant: str, basis_id: str) -> None:
        """Keep the basis until `delete`. Raises `BasisDeleted`."""
        await self._private_bases.use(tenant, basis_id, _PIN + basis_id, deletion_count=_HELD)

    async def delete(self, tenant: str, basis_id: str) -> None:
        """Raises `NotFound` if the tenant does not own it, `Conflict` while adapters or jobs use it."""
        if basis_id not in await self._private_bases.of_tenant(tenant):
            raise basis_not_found(basis_id)
        await self.drop_stale(tenant)
        pin = _PIN + basis_id
        while not await self._private_bases.discard(tenant, basis_id, pin=pin):
            users = await self._private_bases.users(tenant, basis_id) - {pin}
            if users:
                shown = ", ".join(sorted(name.removeprefix(_JOB) for name in users)[:5])
                message = f"basis {basis_id} is needed by {len(users)} adapter(s) or job(s): {shown}"
                raise Conflict(message, code="basis_in_use", param="basis_id")

    async def check_quota(self, tenant: str, num_bytes: int) -> None:
        """Raises `QuotaExceeded` if the tenant may not own a basis of this size beside its others."""
        max_bytes = self._private_bases.max_bytes
        if await self._owned_bytes(tenant) + num_bytes <= max_bytes:
            return
        await self.drop_stale(tenant)
        owned_bytes = await self._owned_bytes(tenant)
        if owned_bytes + num_bytes > max_bytes:
            raise quota_exceeded(num_bytes, owned_bytes, max_bytes, param="adapter.basis")

    async def drop_stale(self, tenant: str) -> None:
        """Drop the holds of jobs that have ended without letting go: their workers died."""
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
