"""Publishing the result of a run: its private basis, if it has one, and the adapter's next version."""

from __future__ import annotations

import hashlib
import time

import torch

from tessera.errors import NotFound
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.queue.records import Job
from tessera.store.adapters import AdapterStore, AdapterVersion, publish_in_basis
from tessera.store.bases import BasisStore
from tessera.store.checkpoints import CheckpointStore
from tessera.store.holds import BasisHolds
from tessera.store.ownership import PrivateBases
from trainer_worker.outcome.payloads import checkpoint_metadata
from trainer_worker.training.run import RunResult, TrainRun
from trainer_worker.training.trainer import CoreRun


def reservation_id(job: Job) -> str:
    """Return the id of the quota that is reserved for the private basis of a job's result."""
    return hashlib.sha256(f"room of {job.job_id}".encode()).hexdigest()


class Publisher:
    """Publishes the results of jobs."""

    def __init__(
        self,
        adapters: AdapterStore,
        bases: BasisStore,
        own: PrivateBases,
        holds: BasisHolds,
        *,
        dtype: torch.dtype,
        base_model_id: str,
        checkpoints: CheckpointStore,
        keep_checkpoints: int,
    ) -> None:
        """dtype: the dtype of a stored R. An R whose private basis is stored with it is kept in float32.

        keep_checkpoints: intermediate states that are kept of a job; 0: none.
        """
        self._adapters, self._bases, self._own, self._holds = adapters, bases, own, holds
        self._dtype, self._base_model_id = dtype, base_model_id
        self._checkpoints, self._keep_checkpoints = checkpoints, keep_checkpoints

    async def publish(self, job: Job, result: RunResult) -> AdapterVersion:
        """Publish the result and return the job's only version. Repeating the call changes nothing.

        Raises `QuotaExceeded`, `AdapterDeleted`, `BasisDeleted`, `InvalidInput`, `StaleLease`.
        """
        if result.own_basis is None:
            return await self._publish_adapter(job, result.adapter, self._dtype)
        # If another attempt has published, its version counts, and no second basis is stored.
        published = await self._published_version(job)
        if published is not None:
            return published
        await self._store_basis(job, result.own_basis)
        return await self._publish_adapter(job, result.adapter, torch.float32)

    async def publish_states(self, job: Job, run: TrainRun) -> None:
        """Store the run's evaluated states as models, beside the adapter's versions.

        Raises `AdapterDeleted`, `InvalidInput`.
        """
        while self._keep_checkpoints and isinstance(run, CoreRun) and run.states:
            state = run.states.popleft()
            metadata = checkpoint_metadata(run, job, state.step)
            await self._checkpoints.put(
                job.tenant,
                job.spec.adapter_id,
                run.to_adapter(state.R, metadata),
                step=state.step,
                job_id=job.job_id,
                created_at=time.time(),
                dtype=self._dtype,
                deletion_count=job.spec.deletion_count,
                keep=self._keep_checkpoints,
            )

    async def drop_states(self, job: Job) -> None:
        """Delete the intermediate states of a job that has published nothing."""
        await self._checkpoints.drop(job.tenant, job.spec.adapter_id, job_id=job.job_id)

    async def _published_version(self, job: Job) -> AdapterVersion | None:
        try:
            record = await self._adapters.get(job.tenant, job.spec.adapter_id)
        except NotFound:
            return None
        return next((version for version in record.versions if version.job_id == job.job_id), None)

    async def _store_basis(self, job: Job, basis: Basis) -> None:
        """Store the basis in its reserved quota. If publishing fails, the job's end drops it again."""
        ownership = await self._holds.reserve(
            job.tenant, basis.manifest, job.job_id, reservation_id=reservation_id(job)
        )
        if ownership is not None:
            await self._bases.put_private(basis, ownership)

    async def _publish_adapter(self, job: Job, adapter: Adapter, dtype: torch.dtype) -> AdapterVersion:
        return await publish_in_basis(
            self._adapters,
            self._own,
            job.tenant,
            job.spec.adapter_id,
            adapter,
            dtype=dtype,
            deletion_count=job.spec.deletion_count,
            job_id=job.job_id,
            base_model_id=self._base_model_id,
        )
