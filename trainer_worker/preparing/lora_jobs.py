"""Jobs of the LoRA form: how A and B come into a run. How they leave it: `outcome/dedicated_publisher.py`.

Everything between is as for other jobs (`session.py`): the run is a `TrainRun` like any other.
"""

from __future__ import annotations

import asyncio

import torch

from tessera.errors import Conflict, CorruptRecord
from tessera.formats.basis import DTYPES
from tessera.methods.bases import CalibrationSet
from tessera.methods.forms import find_preset
from tessera.model.base_model import BaseModel
from tessera.queue.records import JobSpec
from tessera.store.holds import BasisHolds
from trainer_worker.common.model_lock import ModelLock, Progress
from trainer_worker.preparing.basis_source import Attempt
from trainer_worker.training import checkpoint
from trainer_worker.training.data import TrainingData
from trainer_worker.training.lora.dedicated import LORA, reservation_id, storage_dtype
from trainer_worker.training.lora.factors import LoraFactors, form_modules, initial_factors
from trainer_worker.training.lora.form import LoraRun
from trainer_worker.training.plan import LoraKind, make_plan


class LoraPreparation:
    """From a job and its examples to a run of its LoRA form."""

    def __init__(
        self,
        base: BaseModel,
        model_lock: ModelLock,
        *,
        holds: BasisHolds,
        target_modules: tuple[str, ...],
    ) -> None:
        self._base, self._model_lock, self._holds = base, model_lock, holds
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
        await self._holds.reserve_quota(job.tenant, reservation_id(job), num_bytes, job.job_id)
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
        return await self._model_lock.run(work, modules=names, on_progress=attempt.on_progress)
