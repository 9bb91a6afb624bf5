"""An adapter on its way from a job into the store."""

from __future__ import annotations

import torch

from tessera.formats.adapter import Adapter
from tessera.queue.records import Job
from tessera.store import publish
from tessera.store.adapters import AdapterStore, AdapterVersion
from tessera.store.ownership import PrivateBases


class Publisher:
    """Publishes what jobs have trained. dtype: of the stored R."""

    def __init__(
        self, adapters: AdapterStore, own: PrivateBases, *, dtype: torch.dtype, base_model_id: str
    ) -> None:
        self._adapters, self._own = adapters, own
        self._dtype, self._base_model_id = dtype, base_model_id

    async def publish(
        self, job: Job, adapter: Adapter, *, dtype: torch.dtype | None = None
    ) -> AdapterVersion:
        """The job's one version. dtype: if not the usual one.

        Raises `AdapterDeleted`, `BasisDeleted`, `InvalidInput`.
        """
        return await publish.publish(
            self._adapters,
            self._own,
            job.tenant,
            job.spec.adapter_id,
            adapter,
            dtype=dtype or self._dtype,
            deletion_count=job.spec.deletion_count,
            job_id=job.job_id,
            base_model_id=self._base_model_id,
        )
