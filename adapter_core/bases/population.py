"""A basis learned from a population: what other methods read off one gradient, trained over many users.

A and B begin as the leading singular vectors of the users' summed gradient and are then learned jointly, each
user with an R of its own, so that users who train nothing but R get far (`population_learner` says how). Then
they are frozen, for users to come.

Beside A and B comes a start: the core that a user's training best begins with, which is what the population
has in common. It is kept in the basis (`Basis.start`); a new user begins with it (start "population") or
with zero.

Knows how a basis is learned, not whose examples are whose: `population_users` says that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from adapter_core.base_model import BaseModel
from adapter_core.bases import gradient_svd
from adapter_core.bases.calibration import MAX_BATCH_TOKENS, CalibrationSet
from adapter_core.bases.gradients import frozen
from adapter_core.bases.method import DATA_OPTIONS, Option, Options
from adapter_core.bases.population_factors import SharedFactors
from adapter_core.bases.population_learner import Learner, LearningPlan
from adapter_core.bases.population_users import users_of
from adapter_core.bases.targets import find_targets
from adapter_core.basis import Basis, make_basis
from adapter_core.errors import InvalidInput

NAME = "population"
#: The learning begins with the gradient of so many examples; more do not change its leading directions.
INITIAL_EXAMPLES = 1000
MIN_STEPS = 16
#: Over all users' examples. Ten at a basis_rate of 3e-2 learn them by heart (small model on an H100, 29
#: users of 120: the users' own loss falls from 3.96 to 2.80 at rank 16 and to 2.14 at rank 64, which then
#: serves newcomers of 50 examples worse than rank 16: 107 % of LoRA's gain against 118 %). 2.5 at 1e-2
#: (bundled model, 30 users, one seed: from 4.11 to 3.90) bring newcomers of 400 examples from the pooled
#: gradient's 90 % to 94 %.
PASSES = 3.0
#: `core_rate` where none is given, at rank 16; as in training it falls with the rank.
CORE_RATE, RATED_RANK = 1e-2, 16
#: Points of the learning curve that the recipe keeps.
CURVE_POINTS = 20


@dataclass(frozen=True)
class PopulationLearning:
    """The `Refinement` of this method: users, and how they teach."""

    users: Sequence[CalibrationSet]
    plan: LearningPlan
    scale: float

    @property
    def num_steps(self) -> int:
        return self.plan.steps

    @torch.inference_mode(False)
    def refine(self, base: BaseModel, basis: Basis, *, dtype: str, progress: Callable[[int], None]) -> Basis:
        """Learn on from `basis`. Raises `InvalidInput` for rates so high that the loss overflows."""
        targets = find_targets(base.model, [m.name for m in basis.manifest.modules], basis.rank)
        pairs = list(zip(basis.A, basis.B, strict=True))
        factors = SharedFactors(targets, pairs, num_slots=self.plan.num_slots)
        learner = Learner(base, factors, self.users, self.plan)
        losses: list[float] = []
        with frozen(base.model):
            for step in range(self.plan.steps):
                losses.append(self._step(learner, step))
                progress(step + 1)
        learned = {shape: (A, B * self.scale) for shape, (A, B) in factors.tensors().items()}
        return make_basis(
            model_id=base.model_id,
            method=NAME,
            factors=learned,
            recipe={**basis.manifest.recipe, "population": self._account(losses)},
            dtype=dtype,
            start=learner.final_start() / self.scale,
        )

    def _step(self, learner: Learner, step: int) -> float:
        plan = self.plan
        try:
            loss = learner.step(step / plan.steps)
            if plan.retract_every and (step + 1) % plan.retract_every == 0:
                learner.retract()
        except InvalidInput as error:
            raise InvalidInput(
                f"learning the basis failed at step {step + 1} of {plan.steps}: {error.message}; "
                f"take smaller rates than {plan.core_rate:g} and {plan.basis_rate:g}",
                param="core_rate",
            ) from error
        return loss

    def _account(self, losses: Sequence[float]) -> dict[str, Any]:
        """curve: [step, mean loss of the users in the slots since the point before]."""
        size = -(-len(losses) // CURVE_POINTS)
        parts = [losses[i : i + size] for i in range(0, len(losses), size)]
        return {
            "num_users": len(self.users),
            "examples_per_user": [min(map(len, self.users)), max(map(len, self.users))],
            "plan": asdict(self.plan),
            "curve": [[i * size + len(part), sum(part) / len(part)] for i, part in enumerate(parts)],
        }


def plan_learning(calibration: CalibrationSet | None, rank: int, options: Options) -> PopulationLearning:
    """Who teaches, and how. Raises `InvalidInput` for data that make no two users."""
    assert calibration is not None, "the method needs labelled data"
    seed = options["seed"]
    users = users_of(calibration, options["num_users"], seed=seed)
    num_slots = min(options["num_slots"] or len(users), len(users))
    examples_per_step = num_slots * options["batch_size"]
    steps = max(MIN_STEPS, round(options["passes"] * len(calibration) / examples_per_step))
    plan = LearningPlan(
        steps=steps,
        episode_steps=options["episode_steps"] or steps,
        num_slots=num_slots,
        batch_size=options["batch_size"],
        core_rate=options["core_rate"] or CORE_RATE * RATED_RANK / rank,
        basis_rate=options["basis_rate"],
        start_rate=options["start_rate"],
        retract_every=options["retract_every"],
        seed=seed,
        batch_tokens=options["batch_tokens"],
    )
    return PopulationLearning(users, plan, options["scale"])


def initial_part(calibration: CalibrationSet, options: Options) -> CalibrationSet:
    """Some examples of all users, for the gradient that the learning begins with."""
    return calibration.take(INITIAL_EXAMPLES, seed=options["seed"])


OPTIONS: Mapping[str, Option] = {
    **{name: option for name, option in DATA_OPTIONS.items() if name != "num_examples"},
    "num_users": Option(
        0,
        "groups of like examples that stand for users, if the data name none; 0: by size",
        minimum=0,
    ),
    "passes": Option(PASSES, "over all users' examples", minimum=1e-3),
    "num_slots": Option(10, "users in one step; 0: all", minimum=0),
    "batch_size": Option(3, "examples of each user in one step", minimum=1),
    "episode_steps": Option(40, "of a user's R, before it begins anew; 0: never", minimum=0),
    "core_rate": Option(None, "of AdamW on R; unset: 1e-2 · 16 / rank", float, minimum=1e-12),
    "basis_rate": Option(1e-2, "radians that a step turns the vectors of A and B by at most", minimum=0.0),
    "start_rate": Option(
        0.1, "part of the way that the start goes to a user's R after an episode", minimum=0.0, maximum=1.0
    ),
    "retract_every": Option(
        0, "steps between making A and B orthonormal; 0: never, which learns a preconditioner", minimum=0
    ),
    "batch_tokens": Option(MAX_BATCH_TOKENS, "in one pass through the model, with padding", minimum=1),
}

METHOD = replace(
    gradient_svd.METHOD,
    name=NAME,
    description="A, B and a start learned over many users, each with an R of its own",
    paper="first-order MAML, ANIL, arXiv 1909.09157; Reptile, arXiv 1803.02999",
    options=OPTIONS,
    select=initial_part,
    refinement=plan_learning,
)
