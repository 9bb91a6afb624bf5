"""An adapter on its way out: a zip of the two files that PEFT and other LoRA runtimes load."""

from __future__ import annotations

import asyncio
import io
import zipfile

from adapter_core.adapter import Adapter
from adapter_core.basis import Basis
from adapter_core.basis_store import BasisStore
from adapter_core.errors import NotFound
from adapter_core.peft_export import to_peft
from adapter_core.store import AdapterStore


async def peft_zip(
    adapters: AdapterStore,
    bases: BasisStore,
    *,
    tenant: str,
    adapter_id: str,
    version: int | None,
    base_model: str,
) -> bytes:
    """The zip of one version, the active one by default. Raises `NotFound`, `CorruptRecord`."""
    ref = await adapters.resolve(tenant, adapter_id, version)
    [blob] = await adapters.fetch([ref])
    if blob is None:
        raise NotFound(f"adapter {adapter_id!r} is gone", param="model", code="model_not_found")
    basis = await bases.get(ref.basis_id)
    return await asyncio.to_thread(_make_zip, blob, basis, base_model)


def _make_zip(blob: bytes, basis: Basis, base_model: str) -> bytes:
    adapter = Adapter.from_bytes(blob, basis_id=basis.basis_id)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:  # floats do not shrink
        for name, content in to_peft(basis, adapter, base_model=base_model).items():
            out.writestr(name, content)
    return archive.getvalue()
