"""Import an adapter: an ordinary LoRA becomes a version in a private basis of the tenant.

A LoRA that this service exported becomes a version in the basis that it came from. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib

import torch
from torch import Tensor

from service.jobs.heavy_work import ImportTarget
from tessera.errors import BasisDeleted, NotFound, TesseraError, Unavailable
from tessera.formats.adapter import DTYPE_NAMES, Adapter
from tessera.formats.manifest import ModuleShape
from tessera.formats.single_adapter import SingleAdapter
from tessera.model.files import model_name
from tessera.model.layout import linear_shapes
from tessera.peft.files import PeftFiles
from tessera.peft.importing import PeftLora, core_in, read_adapter, to_single_adapter
from tessera.peft.tinylora import TinyLora
from tessera.redis.client import Client
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore, AdapterVersion, publish_in_basis
from tessera.store.bases import BasisStore
from tessera.store.ownership import PrivateBases

#: How often the basis may be deleted during an import before the import fails. Each time is very unlikely.
MAX_DELETIONS = 8


class Imports:
    """Imports adapters of PEFT for one base model, one at a time.

    Each needs several times its size in memory.
    """

    def __init__(
        self,
        adapters: AdapterStore,
        bases: BasisStore,
        private_bases: PrivateBases,
        *,
        base_model: str,
        revision: str | None,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of adapters in shared bases. In a private basis R is float32, which is small beside the
        factors."""
        self._adapters = adapters
        self._bases = bases
        self._private_bases = private_bases
        self._base_model = base_model
        self._revision = revision
        self._dtype = dtype
        self._shapes: dict[str, ModuleShape] = {}
        self._importing = asyncio.Lock()

    async def from_peft(self, target: ImportTarget, files: PeftFiles) -> AdapterVersion:
        """Publish the LoRA as the adapter's next version.

        Raises `InvalidInput` for what cannot be represented, `QuotaExceeded`, `AdapterDeleted`.
        """
        deletion_count = await self._adapters.deletion_count(target.tenant, target.adapter_id)
        async with self._importing:
            if not self._shapes:
                self._shapes = await asyncio.to_thread(
                    linear_shapes, self._base_model, revision=self._revision
                )
            lora = await asyncio.to_thread(
                read_adapter, files.adapter_config, files.adapter_model, self._shapes
            )
            adapter = await self._in_labelled_basis(target, lora)
            if adapter is not None:
                with contextlib.suppress(BasisDeleted):  # after it was read: fall through to a private basis
                    return await self._publish(target, adapter, self._dtype, deletion_count)
            stored = await asyncio.to_thread(to_single_adapter, lora, model_id=target.model_id)
            for _ in range(MAX_DELETIONS):
                with contextlib.suppress(BasisDeleted):
                    return await self._in_private_basis(target, stored, deletion_count)
            return await self._in_private_basis(target, stored, deletion_count)

    async def _in_labelled_basis(self, target: ImportTarget, lora: PeftLora | TinyLora) -> Adapter | None:
        """Return the LoRA in the basis that its label names, or None if it is not from that basis or the
        tenant must not use it."""
        if isinstance(lora, TinyLora) or lora.label is None:
            return None
        try:
            await self._private_bases.check_access(target.tenant, lora.label)
            basis = await self._bases.get(lora.label)
        except NotFound:
            return None
        if basis.manifest.model_id != target.model_id:
            return None
        R: Tensor | None = await asyncio.to_thread(core_in, lora, basis)
        metadata = {"source": "peft", "base_model": model_name(self._base_model)}
        return None if R is None else Adapter(basis.basis_id, R, metadata)

    async def _in_private_basis(
        self, target: ImportTarget, stored: SingleAdapter, deletion_count: int
    ) -> AdapterVersion:
        """Publish the LoRA in a private basis of its own.

        Raises `BasisDeleted` if the basis was deleted before the adapter was published in it: by its owner,
        or because another process failed to import the same LoRA. Nothing is left then, and it can be tried
        again.
        """
        ownership = await self._private_bases.reserve(target.tenant, stored.basis.manifest)
        try:
            if ownership is not None:
                await self._bases.put_private(stored.basis, ownership)
            return await self._publish(target, stored.adapter, torch.float32, deletion_count)
        except (Unavailable, BasisDeleted):
            raise  # the caller tries again, and uses what is already stored
        except TesseraError:
            await self._private_bases.discard(target.tenant, stored.basis.basis_id)
            raise

    async def _publish(
        self, target: ImportTarget, adapter: Adapter, dtype: torch.dtype, deletion_count: int
    ) -> AdapterVersion:
        return await publish_in_basis(
            self._adapters, self._private_bases, target.tenant, target.adapter_id, adapter,
            dtype=dtype, deletion_count=deletion_count, base_model_id=target.model_id,
        )  # fmt: skip


def make_imports(redis: Client, common: CommonSettings) -> Imports:
    """Return the imports over one Redis client."""
    return Imports(
        AdapterStore(redis),
        BasisStore(redis, cache_dir=common.data_dir / "cache" / "bases"),
        PrivateBases(redis, max_bytes=common.max_own_basis_bytes),
        base_model=common.base_model,
        revision=common.base_model_revision,
        dtype=DTYPE_NAMES[common.adapter_dtype],
    )
