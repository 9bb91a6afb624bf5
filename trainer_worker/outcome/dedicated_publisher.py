"""Publishing what a LoRA form has trained: as a basis of the tenant's own and the adapter in it."""

from __future__ import annotations

from dataclasses import replace

import torch

from tessera.errors import NotFound
from tessera.formats.single_adapter import SingleAdapter
from tessera.model.base_model import BaseModel
from tessera.queue.records import Job
from tessera.store.adapters import AdapterStore, AdapterVersion
from tessera.store.bases import BasisStore
from tessera.store.holds import BasisHolds
from trainer_worker.outcome import reports
from trainer_worker.outcome.publication import Publisher
from trainer_worker.training.lora.dedicated import LORA, METHOD, dedicated, reservation_id, storage_dtype
from trainer_worker.training.lora.form import LoraRun


class DedicatedPublisher:
    """Stores what a LoRA form has trained: the basis, then the adapter in it."""

    def __init__(
        self,
        base: BaseModel,
        publisher: Publisher,
        *,
        adapters: AdapterStore,
        bases: BasisStore,
        holds: BasisHolds,
    ) -> None:
        self._base, self._publisher = base, publisher
        self._adapters, self._bases, self._holds = adapters, bases, holds

    def make(self, run: LoraRun, job: Job) -> SingleAdapter:
        """The best state of a run, with its provenance. Takes a QR of every module's factors."""
        made = dedicated(self._base, run, dtype=storage_dtype(self._base))
        metadata = reports.provenance(run, job, METHOD) | {"form": LORA, "preset": run.factors.preset.name}
        return SingleAdapter(made.basis, replace(made.adapter, metadata=metadata))

    async def publish(self, job: Job, made: SingleAdapter) -> AdapterVersion:
        """The job's one version. Repeating it changes nothing, also where another attempt has published: what
        that trained counts, and nothing is stored beside it.

        Raises `QuotaExceeded`, `AdapterDeleted`, `StaleLease`.
        """
        published = await self._published(job)
        if published is not None:
            return published
        ownership = await self._holds.reserve(
            job.tenant, made.basis.manifest, job.job_id, reservation_id=reservation_id(job)
        )  # what fails from here on is dropped with the hold
        if ownership is not None:
            await self._bases.put_private(made.basis, ownership)
        return await self._publisher.publish(job, made.adapter, dtype=torch.float32)

    async def _published(self, job: Job) -> AdapterVersion | None:
        try:
            record = await self._adapters.get(job.tenant, job.spec.adapter_id)
        except NotFound:
            return None
        return next((version for version in record.versions if version.job_id == job.job_id), None)
