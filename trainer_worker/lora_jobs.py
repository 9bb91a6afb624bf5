"""Jobs of the LoRA form: how A and B come into a run, and how they leave it as a basis of the tenant's own.

Everything between is as for other jobs (`session.py`): the run is a `TrainRun` like any other.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace

import torch

from adapter_core.adapter_records import AdapterVersion
from adapter_core.base_model import BaseModel
from adapter_core.bases import CalibrationSet
from adapter_core.basis import DTYPES
from adapter_core.basis_holds import BasisHolds
from adapter_core.basis_store import BasisStore
from adapter_core.dedicated import Dedicated
from adapter_core.errors import Conflict, CorruptRecord, NotFound
from adapter_core.job_records import Job, JobSpec
from adapter_core.lora_presets import find_preset
from adapter_core.store import AdapterStore
from trainer_worker import checkpoint, reports
from trainer_worker.basis_source import Attempt
from trainer_worker.data import TrainingData
from trainer_worker.lora_dedicated import METHOD, dedicated
from trainer_worker.lora_factors import LoraFactors, form_modules, initial_factors
from trainer_worker.lora_form import LoraRun
from trainer_worker.plan import LoraKind, make_plan
from trainer_worker.publication import Publisher
from trainer_worker.sole_use import Progress, SoleUse

LORA = "lora"


def storage_dtype(base: BaseModel) -> str:
    """Of a trained basis. A model in half precision serves its factors in its own dtype, which is no finer
    than float16 for orthonormal ones."""
    return "float32" if base.model.dtype in (torch.float32, torch.float64) else "float16"


class LoraPreparation:
    """From a job and its examples to a run of its LoRA form."""

    def __init__(
        self,
        base: BaseModel,
        use: SoleUse,
        *,
        holds: BasisHolds,
        target_modules: tuple[str, ...],
    ) -> None:
        self._base, self._use, self._holds = base, use, holds
        self._target_modules = target_modules

    async def prepare(
        self, attempt: Attempt, data: TrainingData, saved: bytes | None
    ) -> tuple[LoraRun, list[tuple[str, str]]]:
        """The run, in the state of the checkpoint `saved` if it fits, and warnings.

        Raises `InvalidInput`, `UnsupportedModel`, `QuotaExceeded` (before any work), `TesseraError`
        (out_of_memory).
        """
        spec = attempt.job.spec
        blank = self._blank_factors(spec)
        job, num_bytes = attempt.job, self._stored_bytes(blank)
        # Now, so that publishing cannot fail for lack of room.
        await self._holds.keep_room(job.tenant, room_of(job), num_bytes, job.job_id)
        plan = make_plan(
            spec.hyperparameters,
            spec.early_stopping,
            num_examples=data.num_train,
            kind=LoraKind(spec.method, spec.rank),
            seed=spec.seed,
        )
        warnings = []
        if saved is not None:
            run = LoraRun(attempt.job.job_id, data, plan, blank)
            try:
                await asyncio.to_thread(checkpoint.restore, run, saved)
                return run, []
            except (CorruptRecord, Conflict) as error:
                warnings.append(("checkpoint_unusable", f"training starts afresh: {error.message}"))
        factors = await self._initial(attempt, CalibrationSet.from_encoded(data.train))
        return LoraRun(attempt.job.job_id, data, plan, factors), warnings

    def _blank_factors(self, spec: JobSpec) -> LoraFactors:
        """Of the right shapes, to be filled from a checkpoint."""
        preset = find_preset(spec.method)
        preset.check_options(spec.basis_options)
        targets = spec.target_modules or self._target_modules
        modules = form_modules(self._base, preset, rank=spec.rank, target_modules=targets)
        A = tuple(torch.zeros(spec.rank, module.d_in) for module in modules)
        B = tuple(torch.zeros(module.d_out, spec.rank) for module in modules)
        recipe = {"form": LORA, "preset": preset.name, "rank": spec.rank, "seed": spec.seed}
        return LoraFactors(preset, spec.rank, spec.seed, modules, A, B, recipe)

    def _stored_bytes(self, factors: LoraFactors) -> int:
        item_bytes = DTYPES[storage_dtype(self._base)].itemsize
        width = sum(module.d_in + module.d_out for module in factors.modules)
        return item_bytes * factors.preset.stored_rank(factors.rank) * width

    async def _initial(self, attempt: Attempt, examples: CalibrationSet) -> LoraFactors:
        spec = attempt.job.spec
        preset = find_preset(spec.method)
        targets = tuple(spec.target_modules or self._target_modules)
        modules = form_modules(self._base, preset, rank=spec.rank, target_modules=targets)

        def work(progress: Progress) -> LoraFactors:
            return initial_factors(
                self._base, preset, rank=spec.rank, target_modules=targets, seed=spec.seed,
                calibration=examples if preset.needs_examples else None, progress=progress,
                **spec.basis_options,
            )  # fmt: skip

        if preset.method is None:
            return await asyncio.to_thread(work, lambda done, total: None)
        names = [module.name for module in modules]
        return await self._use.run(work, modules=names, on_progress=attempt.on_progress)


def room_of(job: Job) -> str:
    """The id of the room that is kept for the job's result."""
    return hashlib.sha256(f"room of {job.job_id}".encode()).hexdigest()


def start_message(run: LoraRun) -> str:
    """What is trained, in a sentence."""
    preset, shapes = run.factors.preset, run.factors.modules
    what = "A and B" if preset.trains_A else "B, with A by a local rule" if preset.online else "B"
    return (
        f"LoRA form {preset.name}, rank {run.factors.rank}: trains {what} of {len(shapes)} modules, "
        f"{run.factors.num_trained} numbers"
    )


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

    def make(self, run: LoraRun, job: Job) -> Dedicated:
        """The best state of a run, with its provenance. Takes a QR of every module's factors."""
        made = dedicated(self._base, run, dtype=storage_dtype(self._base))
        metadata = reports.provenance(run, job, METHOD) | {"form": LORA, "preset": run.factors.preset.name}
        return Dedicated(made.basis, replace(made.adapter, metadata=metadata))

    async def publish(self, job: Job, made: Dedicated) -> AdapterVersion:
        """The job's one version. Repeating it changes nothing, also where another attempt has published: what
        that trained counts, and nothing is stored beside it.

        Raises `QuotaExceeded`, `AdapterDeleted`, `StaleLease`.
        """
        published = await self._published(job)
        if published is not None:
            return published
        ownership = await self._holds.reserve(
            job.tenant, made.basis.manifest, job.job_id, room_id=room_of(job)
        )  # what fails from here on is dropped with the hold
        if ownership is not None:
            await self._bases.put_own(made.basis, ownership)
        return await self._publisher.publish(job, made.adapter, dtype=torch.float32)

    async def _published(self, job: Job) -> AdapterVersion | None:
        try:
            record = await self._adapters.get(job.tenant, job.spec.adapter_id)
        except NotFound:
            return None
        return next((version for version in record.versions if version.job_id == job.job_id), None)
