"""Publishing an adapter with a note that it uses its basis, so that no private basis outlives its use.

Jobs and imports both publish through this function. It knows neither jobs nor HTTP.
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
    """Note the adapter as a user of its basis, then publish it. Repeating this changes nothing.

    Raises what `AdapterStore.publish` raises, and `BasisDeleted`. After a permanent failure the note is
    withdrawn, and the basis is deleted if nothing else uses it.
    """
    basis_id = adapter.basis_id
    # Values that cannot be stored must fail before the note is made: withdrawing it could withdraw the note
    # of another job that is publishing an adapter of the same name.
    adapter.to_bytes(version=1, dtype=dtype)
    await private_bases.use(tenant, basis_id, adapter_id, deletion_count=deletion_count)
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
