"""A basis learned from a population of users: what the published methods read off one gradient, trained.

A and B are trained jointly over many users, each with its own R, and then frozen for all users to come. They begin
as the leading singular vectors of the summed gradient, and are learned so that users who train R alone get far
(`population_learner`). Beside the basis comes a start: the core that a user's training best begins with, the
point that the population's users have in common. It is an adapter like any other of this basis.

Last, the coordinates are turned and scaled by how the population's cores spread around the start:

    C_out = mean (R_u - S)(R_u - S)ᵀ = V_out Λ_out V_outᵀ,    P_out = Λ_out^(τ/2) (mean 1),   likewise C_in

so that AdamW on R' = P_out^-1 R P_in^-1, whose steps are of one size in every entry, goes far where users differ
and little where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from adapter_core.adapter import Adapter
from adapter_core.base_model import LLAMA_LINEARS, BaseModel
from adapter_core.bases.calibration import CalibrationSet
from adapter_core.bases.population_factors import SharedFactors
from adapter_core.bases.population_learner import RETRACT_EVERY, Learner, LearningPlan
from adapter_core.bases.targets import find_targets
from adapter_core.basis import Basis, ModuleShape, make_basis


@dataclass(frozen=True)
class LearnedBasis:
    """basis; start: its adapter to begin with; losses: the mean loss of the users in the slots at every step."""

    basis: Basis
    start: Adapter
    losses: tuple[float, ...]


def learn(
    base: BaseModel,
    users: Sequence[CalibrationSet],
    initial: Basis,
    plan: LearningPlan,
    *,
    spread: float = 0.5,
    with_start: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> LearnedBasis:
    rank = initial.rank
    targets = find_targets(base.model, [m.name for m in initial.manifest.modules], rank)
    factors = SharedFactors(targets, list(zip(initial.A, initial.B, strict=True)), num_slots=plan.num_slots)
    learner = Learner(base, factors, users, plan)
    losses = []
    for step in range(plan.steps):
        losses.append(learner.step(step / plan.steps))
        if (step + 1) % RETRACT_EVERY == 0:
            learner.retract()
        if progress is not None:
            progress(step + 1, plan.steps)
    learner.retract()
    return learner, losses
