"""A basis learned from a population: what other methods read off one gradient, trained over many users.

A and B begin as the leading singular vectors of the users' summed gradient and are then learned jointly, each
user with an R of its own, so that users who train nothing but R get far (`population_learner` says how). Then
they are frozen, for users to come.

How far learning goes is decided by users who never teach: `population_trials`. A population of fewer than
eight has none to spare and learns to the end.

Beside A and B comes a start: the core that a user's training best begins with, which is what the population
has in common. It is kept in the basis (`Basis.start`); a new user begins with it (start "population") or
with zero.

Knows how a basis is learned, not whose examples are whose: `population_users` says that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tessera.errors import InvalidInput
from tessera.formats.basis import Basis, make_basis
from tessera.methods.building.calibration import MAX_BATCH_TOKENS, CalibrationSet
from tessera.methods.building.gradient_space import gradient_factors, gradient_needs
from tessera.methods.building.gradients import frozen
from tessera.methods.building.method import DATA_OPTIONS, Method
from tessera.methods.building.targets import find_targets
from tessera.methods.options import Option, Options
from tessera.methods.population.factors import SharedFactors
from tessera.methods.population.learner import Learner, LearningPlan
from tessera.methods.population.trials import TrialPlan, Trials
from tessera.methods.population.users import Population, hold_out, users_of
from tessera.model.base_model import BaseModel

NAME = "population"
#: The learning begins with the gradient of so many examples; more do not change its leading directions.
INITIAL_EXAMPLES = 1000
MIN_STEPS = 16
#: Over all users' examples, where those held out do not end it earlier. Ten at a basis_rate of 3e-2 learn
#: them by heart (29 users of 120: their own loss falls from 3.96 to 2.80 at rank 16, and to 2.14 at rank 64,
#: which then serves newcomers of 50 examples worse than rank 16). At 1e-2 the held-out users' loss still
#: falls from 3.732 after three passes to 3.703 after six, by 0.002 in the last.
PASSES = 6.0
#: `core_rate` where none is given, at rank 16; as in training it falls with the rank.
CORE_RATE, RATED_RANK = 1e-2, 16
#: Points of the learning curve that the recipe keeps.
CURVE_POINTS = 20


@dataclass(frozen=True)
class PopulationLearning:
    """The `Refinement` of this method: users who teach, users held out, and how they do it."""

    users: Sequence[CalibrationSet]
    held_out: Sequence[CalibrationSet]
    plan: LearningPlan
    scale: float

    @property
    def num_steps(self) -> int:
        """Of A and B, and of all trials."""
        return self.plan.steps + TrialPlan.of(self.plan, len(self.held_out)).num_steps

    @torch.inference_mode(False)
    def refine(self, base: BaseModel, basis: Basis, *, dtype: str, progress: Callable[[int], None]) -> Basis:
        """Learn on from `basis`. Raises `InvalidInput` for rates so high that the loss overflows."""
        targets = find_targets(base.model, [m.name for m in basis.manifest.modules], basis.rank)
        pairs = list(zip(basis.A, basis.B, strict=True))
        factors = SharedFactors(targets, pairs, num_slots=self.plan.num_slots)
        learner = Learner(base, factors, self.users, self.plan)
        trials = Trials(base, factors, self.held_out, self.plan)
        with frozen(base.model):
            losses = self._learn(learner, trials, progress)
        start, learned = learner.final_init(), factors.tensors()
        if trials.best is not None:
            start = trials.best.start.to(factors.device)
            learned = trials.best.on(factors.device)
        account = {**self._account(losses), "held_out": trials.account()}
        return make_basis(
            model_id=base.model_id,
            method=NAME,
            factors={shape: (A, B * self.scale) for shape, (A, B) in learned.items()},
            recipe={**basis.manifest.recipe, "population": account},
            dtype=dtype,
            start=start / self.scale,
        )

    def _learn(self, learner: Learner, trials: Trials, progress: Callable[[int], None]) -> list[float]:
        """The losses of all steps; the last is that of the plan, or the one after which trials end it."""
        losses: list[float] = []
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(done)

        for step in range(self.plan.steps + 1):
            with self._naming(step):
                trials.hold(step, learner.final_init(), advance)
                if step == self.plan.steps or trials.have_risen:
                    break
                losses.append(learner.step(step / self.plan.steps))
                if self.plan.retract_every and (step + 1) % self.plan.retract_every == 0:
                    learner.retract()
            advance()
        if done < self.num_steps:
            progress(self.num_steps)
        return losses

    @contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        """What fails after `step` steps says so."""
        try:
            yield
        except InvalidInput as error:
            plan = self.plan
            raise InvalidInput(
                f"learning the basis failed at step {min(step + 1, plan.steps)} of {plan.steps}: "
                f"{error.message}; take smaller rates than {plan.core_rate:g} and {plan.basis_rate:g}",
                param="core_rate",
            ) from error

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
    users, held_out = roles(calibration, options)
    num_slots = min(options["num_slots"] or len(users), len(users))
    examples_per_step = num_slots * options["batch_size"]
    steps = max(MIN_STEPS, round(options["passes"] * sum(map(len, users)) / examples_per_step))
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
    return PopulationLearning(users, held_out, plan, options["scale"])


def roles(calibration: CalibrationSet, options: Options) -> tuple[list[CalibrationSet], ...]:
    """(users who teach, users held out). Raises `InvalidInput` for data that make no two users."""
    users = users_of(calibration, options["num_users"], seed=options["seed"])
    return hold_out(users, options["held_out"], seed=options["seed"])


def initial_part(calibration: CalibrationSet, options: Options) -> CalibrationSet:
    """Some examples of all users who teach, for the gradient that the learning begins with."""
    teachers, held_out = roles(calibration, options)
    taught = Population.of(teachers) if held_out else calibration
    return taught.take(INITIAL_EXAMPLES, seed=options["seed"])


OPTIONS: Mapping[str, Option] = {
    **{name: option for name, option in DATA_OPTIONS.items() if name != "num_examples"},
    "num_users": Option(
        0,
        "groups of like examples that stand for users, if the data name none; 0: by size",
        minimum=0,
    ),
    "passes": Option(PASSES, "over all users' examples", minimum=1e-3),
    "held_out": Option(
        0.15,
        "part of 8 or more users who never teach but say how far learning goes (2 to 10 users); 0: none, "
        "learning goes to the end",
        minimum=0.0,
        maximum=0.5,
    ),
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

METHOD = Method(
    name=NAME,
    description="A, B and a start learned over many users, each with an R of its own",
    paper="first-order MAML, ANIL, arXiv 1909.09157; Reptile, arXiv 1803.02999",
    factorise=gradient_factors,
    needs_calibration="labelled",
    options=OPTIONS,
    needs=gradient_needs,
    select=initial_part,
    refinement=plan_learning,
)
