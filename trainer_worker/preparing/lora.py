"""Preparation of jobs of a LoRA form: the factors A and B that training begins with."""

from __future__ import annotations

import asyncio

import torch

from tessera.formats.basis import DTYPES
from tessera.methods.bases import CalibrationSet
from tessera.methods.forms import find_preset
from tessera.methods.scaling import Scaling
from tessera.model.base_model import BaseModel
from tessera.model.rank_pattern import module_ranks
from tessera.queue.records import JobSpec
from tessera.store.holds import BasisHolds
from trainer_worker.common.model_lock import ModelLock, Progress
from trainer_worker.data.training_data import TrainingData
from trainer_worker.outcome.publisher import reservation_id
from trainer_worker.preparing.basis_source import Attempt
from trainer_worker.training import checkpoint
from trainer_worker.training.learning_rates import LoraKind
from trainer_worker.training.lora.factors import LORA, LoraFactors, form_modules, initial_factors
from trainer_worker.training.lora.single_adapter import storage_dtype
from trainer_worker.training.lora.trainer import LoraRun
from trainer_worker.training.objectives.objective import Objective
from trainer_worker.training.plan import make_plan


class LoraPreparation:
    """Prepares runs of LoRA forms."""

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
        self, attempt: Attempt, data: TrainingData, objective: Objective, saved: bytes | None
    ) -> tuple[LoraRun, list[tuple[str, str]]]:
        """Return the run, in the state of the checkpoint `saved` if it fits, and warnings.

        Raises `InvalidInput`, `UnsupportedModel`, `QuotaExceeded` (before any work), `TesseraError`
        (out_of_memory).
        """
        job, spec = attempt.job, attempt.job.spec
        blank = self._blank_factors(spec)
        # Reserve quota for the result now, so that publishing cannot fail for lack of room.
        await self._holds.reserve_quota(
            job.tenant, reservation_id(job), self._stored_bytes(blank), job.job_id
        )
        plan = make_plan(
            spec.hyperparameters,
            spec.early_stopping,
            num_examples=data.num_train,
            kind=LoraKind(spec.method, spec.rank, blank.scale, spec.objective),
            seed=spec.seed,
        )
        warnings: list[tuple[str, str]] = []
        if saved is not None:
            run = LoraRun(job.job_id, data, plan, blank, objective=objective)
            warnings = await asyncio.to_thread(checkpoint.try_restore, run, saved)
            if not warnings:
                return run, []
        factors = await self._initial(attempt, CalibrationSet.from_encoded(data.answers))
        return LoraRun(job.job_id, data, plan, factors, objective=objective), warnings

    def _blank_factors(self, spec: JobSpec) -> LoraFactors:
        """Zero factors of the right shapes, to be restored from a checkpoint."""
        preset = find_preset(spec.method)
        preset.check_options(spec.basis_options)
        targets = spec.target_modules or self._target_modules
        modules = form_modules(
            self._base, preset, rank=spec.rank, target_modules=targets, rank_pattern=spec.rank_pattern
        )
        ranks = module_ranks([m.name for m in modules], spec.rank, spec.rank_pattern)
        rank = max(ranks)
        A = tuple(torch.zeros(rank, module.d_in) for module in modules)
        B = tuple(torch.zeros(module.d_out, rank) for module in modules)
        recipe = {"form": LORA, "preset": preset.name, "rank": spec.rank, "seed": spec.seed}
        online = preset.local_rule(spec.basis_options)
        return LoraFactors(
            preset, rank, spec.seed, modules, A, B, recipe, scaling_of(spec), online,
            ranks=tuple(ranks) if spec.rank_pattern else (),
        )  # fmt: skip

    def _stored_bytes(self, factors: LoraFactors) -> int:
        item_bytes = DTYPES[storage_dtype(self._base)].itemsize
        width = sum(module.d_in + module.d_out for module in factors.modules)
        return item_bytes * factors.preset.stored_rank(factors.rank) * width

    async def _initial(self, attempt: Attempt, examples: CalibrationSet) -> LoraFactors:
        spec = attempt.job.spec
        preset = find_preset(spec.method)
        targets = tuple(spec.target_modules or self._target_modules)
        modules = form_modules(
            self._base, preset, rank=spec.rank, target_modules=targets, rank_pattern=spec.rank_pattern
        )

        def work(progress: Progress) -> LoraFactors:
            return initial_factors(
                self._base, preset, rank=spec.rank, target_modules=targets, seed=spec.seed,
                calibration=examples if preset.needs_examples(spec.basis_options) else None,
                progress=progress, scaling=scaling_of(spec), rank_pattern=spec.rank_pattern,
                **spec.basis_options,
            )  # fmt: skip

        if preset.method is None:
            return await asyncio.to_thread(work, lambda done, total: None)
        names = [module.name for module in modules]
        return await self._model_lock.run(work, modules=names, on_progress=attempt.listener.note_modules)


def scaling_of(spec: JobSpec) -> Scaling:
    """Return what the job says about s: as such, or as an option of the form."""
    option = spec.basis_options.get("scale")
    return spec.scaling if spec.scaling.is_given or option is None else Scaling(float(option))


def form_message(run: LoraRun) -> str:
    """Return a sentence for the job's owner on what is trained."""
    preset, shapes = run.factors.preset, run.factors.modules
    trained = "A and B" if preset.trains_A else "B"
    if run.factors.online is not None:
        trained = f"B, and A by a local rule at {run.factors.online.lr:g},"
    return (
        f"LoRA form {preset.name}, rank {run.factors.rank}: trains {trained} of {len(shapes)} modules, "
        f"{run.factors.num_trained} numbers"
    )
