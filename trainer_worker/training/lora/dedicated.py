"""A trained LoRA form as a dedicated basis and the adapter in it: stored and served like every other.

    delta_W = s (B A - B_0 A_0) = s [B, -B_0] [A; A_0]

Exact, of rank 2 r where an initial product was taken off and A has moved, of rank r elsewhere
(`tessera/formats/single_adapter.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tessera.defaults import LLAMA_LINEARS
from tessera.formats.single_adapter import LowRank, SingleAdapter, make_single_adapter
from tessera.methods.bases import CalibrationSet
from tessera.model.base_model import BaseModel
from tessera.queue.records import Job
from trainer_worker.training.data import TrainingData
from trainer_worker.training.lora.factors import initial_factors
from trainer_worker.training.lora.form import LoraRun, LoraTrainer
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.run import RunUpdate

#: What the manifest of such a basis calls its method.
METHOD = "lora_form"
#: What a job's specification calls its form.
LORA = "lora"


def train_lora(
    base: BaseModel,
    data: TrainingData,
    plan: TrainingPlan,
    *,
    preset: str,
    rank: int,
    target_modules: Sequence[str] = LLAMA_LINEARS,
    calibration: CalibrationSet | None = None,
    token_budget: int = 2048,
    on_update: Callable[[RunUpdate], None] | None = None,
) -> tuple[SingleAdapter, LoraRun]:
    """Train one run of a LoRA form to its end; what was best on the validation data, as basis and adapter.

    calibration: for the forms that start from data; the training examples, if not given. Raises
    `InvalidInput`, `UnsupportedModel`.
    """
    calibration = calibration or CalibrationSet.from_encoded(data.train)
    factors = initial_factors(
        base, preset, rank=rank, target_modules=target_modules, calibration=calibration, seed=plan.seed
    )
    run = LoraRun("lora", data, plan, factors)
    trainer = LoraTrainer(base, [run], token_budget=token_budget)
    while not run.is_finished:
        for update in trainer.step():
            if on_update is not None:
                on_update(update)
    return dedicated(base, run), run


def dedicated(
    base: BaseModel, run: LoraRun, *, packed: Tensor | None = None, dtype: str = "float32"
) -> SingleAdapter:
    """The run's best factors, or those of `packed` [2, P], as a basis of their own and its adapter."""
    factors = run.factors
    changes = {}
    initial = zip(factors.modules, factors.A, factors.B, strict=True)
    for (A, B), (shape, A0, B0) in zip(run.trained(packed), initial, strict=True):
        A, B = A.detach().cpu(), B.detach().cpu()
        if factors.preset.is_subtracted and not factors.preset.trains_A:
            B = B.double() - B0.double()
        elif factors.preset.is_subtracted:
            A, B = torch.cat([A, A0.to(A)]), torch.cat([B, -B0.to(B)], dim=1)
        changes[shape] = LowRank(A, B, factors.scale)
    metadata = {
        "method": METHOD,
        "preset": factors.preset.name,
        "steps": run.progress.step,
        "valid_loss": run.progress.best_valid_loss,
    }
    return make_single_adapter(
        changes, model_id=base.model_id, method=METHOD, metadata=metadata, dtype=dtype,
        recipe={**factors.recipe, "learning_rate": run.plan.learning_rate},
    )  # fmt: skip


def storage_dtype(base: BaseModel) -> str:
    """Of a trained basis. A model in half precision serves its factors in its own dtype, which is no finer
    than float16 for orthonormal ones."""
    return "float32" if base.model.dtype in (torch.float32, torch.float64) else "float16"


def reservation_id(job: Job) -> str:
    """The id under which quota is reserved for the result of the job."""
    return hashlib.sha256(f"room of {job.job_id}".encode()).hexdigest()
