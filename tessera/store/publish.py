"""Publishing an adapter in whatever basis it is in, so that a basis of a tenant's own never outlives its use.

Knows neither jobs nor HTTP; both publish through here.
"""

from __future__ import annotations

import torch

from tessera.errors import NotFound, TesseraError, Unavailable
from tessera.formats.adapter import Adapter
from tessera.store.adapters import AdapterStore, AdapterVersion
from tessera.store.ownership import PrivateBases


async def publish(
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
    """`AdapterStore.publish`, with a note in the basis before it. Repeating it changes nothing.

    Raises what that raises, and `BasisDeleted`. If it fails for good, the note is
    taken back, and the basis goes if nobody else needs it.
    """
    basis_id = adapter.basis_id
    # What cannot be stored fails before the note: taking that back could take back the note of another job
    # that is just publishing an adapter of the same name.
    adapter.to_bytes(version=1, dtype=dtype)
    await private_bases.use(tenant, basis_id, adapter_id, deletion_count=deletion_count)
    try:
        return await adapters.publish(
            tenant, adapter_id, adapter, dtype=dtype, deletion_count=deletion_count, job_id=job_id,
            base_model_id=base_model_id,
        )  # fmt: skip
    except Unavailable:
        raise  # it may have been stored, and will be tried again
    except TesseraError:
        try:
            await adapters.get(tenant, adapter_id)
        except NotFound:
            await private_bases.release(tenant, adapter_id, deletion_count=deletion_count + 1)
        raise
