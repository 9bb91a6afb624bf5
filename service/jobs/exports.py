"""Export an adapter: a zip of the two files that PEFT and other LoRA runtimes load."""

from __future__ import annotations

import asyncio
import io
import zipfile

from tessera.formats.adapter import Adapter, holds_trained_numbers
from tessera.formats.basis import Basis
from tessera.peft.exporting import to_peft
from tessera.peft.tinylora import PEFT_TYPE as TINYLORA
from tessera.peft.tinylora_export import to_tinylora
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore


async def peft_zip(
    adapters: AdapterStore,
    bases: BasisStore,
    *,
    tenant: str,
    adapter_id: str,
    version: int | None,
    base_model: str,
    peft_type: str = "LORA",
) -> bytes:
    """Return the zip of one version, the active one by default. Raises `NotFound`, `AdapterReplaced`,
    `CorruptRecord`, `BasisMismatch`, and `InvalidInput` for what that type of PEFT cannot hold."""
    ref = await adapters.resolve(tenant, adapter_id, version)
    [blob] = await adapters.fetch([ref])
    cores = (await bases.get(ref.basis_id)).cores if holds_trained_numbers(blob) else None
    adapter = await asyncio.to_thread(Adapter.of_version, ref, blob, cores)
    basis = await bases.get(ref.basis_id)
    return await asyncio.to_thread(_make_zip, adapter, basis, base_model, peft_type)


def _make_zip(adapter: Adapter, basis: Basis, base_model: str, peft_type: str) -> bytes:
    make_files = to_tinylora if peft_type == TINYLORA else to_peft
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:  # floating-point numbers hardly compress
        for name, content in make_files(basis, adapter, base_model=base_model).items():
            out.writestr(name, content)
    return archive.getvalue()
