"""The method `population`: A, B and an initialization, learned over many users.

    min over A, B, S of   Σ_users loss(user's R after some steps from S)     first-order MAML, ANIL (arXiv
                                                                              1909.09157)
    S ← S + ε (R - S) at the end of a user's episode                          Reptile (arXiv 1803.02999)

Other methods read their basis off one gradient. Here A and B begin as the leading singular vectors of the
users' summed gradient, and are then learned jointly while each user has an R of its own, so that users who
train only R get far (`learner.py`). After that they are frozen, for new users.

Users who never teach decide how long learning goes on (`trials.py`). A population of fewer than eight users
has none to spare and learns to the end. The learned initialization S is what the population has in common.
The basis keeps it (`Basis.start`), and a new user begins with it (init "population") or with zero.

Needs labelled examples and, better, the user of each (`users.py`). Unlike in the papers, a user's own part is
inside every layer.
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
#: Number of examples in the gradient with which learning begins; more do not change its leading directions.
INITIAL_EXAMPLES = 1000
#: The least number of steps of learning.
MIN_STEPS = 16
#: Passes over all users' examples, unless the held-out users end learning earlier. Ten passes at a basis_rate
#: of 3e-2 learn the examples by heart (29 users of 120: their own loss falls from 3.96 to 2.80 at rank 16 and
#: to 2.14 at rank 64, which then serves newcomers of 50 examples worse than rank 16). At 1e-2 the held-out
#: users' loss falls from 3.732 after three passes to 3.703 after six, and by 0.002 in the last of them.
PASSES = 6.0
#: The default of `core_rate` at rank 16; as in training, it is inversely proportional to the rank.
CORE_RATE, RATED_RANK = 1e-2, 16
#: Number of points of the learning curve that the recipe keeps.
CURVE_POINTS = 20


@dataclass(frozen=True)
class PopulationLearning:
    """The `Refinement` of this method."""

    #: The users whose examples are learned.
    users: Sequence[CalibrationSet]
    #: The users who decide how long learning goes on.
    held_out: Sequence[CalibrationSet]
    plan: LearningPlan
    #: s in delta_W = s B' R' A'.
    scale: float

    @property
    def num_steps(self) -> int:
        """Number of steps: learning A and B, plus every trial."""
        return self.plan.steps + TrialPlan.of(self.plan, len(self.held_out)).num_steps

    @torch.inference_mode(False)
    def refine(self, base: BaseModel, basis: Basis, *, dtype: str, progress: Callable[[int], None]) -> Basis:
        """Learn on from `basis`. Raises `InvalidInput` if the rates are so high that the loss overflows."""
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
        """Return the losses of all steps, up to the last of the plan or to where the trials end learning."""
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
        """Add the step and the rates to the message of an error in this context."""
        try:
            yield
        except InvalidInput as error:
            plan = self.plan
            raise InvalidInput(
                f"learning the basis failed at step {min(step + 1, plan.steps)} of {plan.steps}: "
                f"{error.message}; use a smaller core_rate ({plan.core_rate:g}) or basis_rate "
                f"({plan.basis_rate:g})",
                param="core_rate",
            ) from error

    def _account(self, losses: Sequence[float]) -> dict[str, Any]:
        """Return the recipe's record. curve: [step, mean loss of the slots' users since the last point]."""
        size = -(-len(losses) // CURVE_POINTS)
        parts = [losses[i : i + size] for i in range(0, len(losses), size)]
        return {
            "num_users": len(self.users),
            "examples_per_user": [min(map(len, self.users)), max(map(len, self.users))],
            "plan": asdict(self.plan),
            "curve": [[i * size + len(part), sum(part) / len(part)] for i, part in enumerate(parts)],
        }


def plan_learning(calibration: CalibrationSet | None, rank: int, options: Options) -> PopulationLearning:
    """Return who teaches and how. Raises `InvalidInput` if the data do not make two users."""
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
    """Return (users who teach, users held out). Raises `InvalidInput` if the data do not make two users."""
    users = users_of(calibration, options["num_users"], seed=options["seed"])
    return hold_out(users, options["held_out"], seed=options["seed"])


def initial_part(calibration: CalibrationSet, options: Options) -> CalibrationSet:
    """Draw examples of all users who teach, for the gradient with which learning begins."""
    teachers, held_out = roles(calibration, options)
    taught = Population.of(teachers) if held_out else calibration
    return taught.take(INITIAL_EXAMPLES, seed=options["seed"])


OPTIONS: Mapping[str, Option] = {
    **{name: option for name, option in DATA_OPTIONS.items() if name != "num_examples"},
    "num_users": Option(
        0,
        "number of groups of similar examples that stand for users if the data name none; 0: by size",
        minimum=0,
    ),
    "passes": Option(PASSES, "maximal number of passes over all users' examples", minimum=1e-3),
    "held_out": Option(
        0.15,
        "share of 8 or more users (2 to 10 of them) who do not teach but decide how long learning goes on; "
        "0: none, and all passes are made",
        minimum=0.0,
        maximum=0.5,
    ),
    "num_slots": Option(10, "number of users in one step; 0: all", minimum=0),
    "batch_size": Option(3, "examples of each user in one step", minimum=1),
    "episode_steps": Option(
        40, "steps of a user's R before the next user takes the slot; 0: all steps", minimum=0
    ),
    "core_rate": Option(None, "AdamW's learning rate for R; default 1e-2 · 16 / rank", float, minimum=1e-12),
    "basis_rate": Option(
        1e-2, "maximal angle, in radians, by which a step turns the vectors of A and B", minimum=0.0
    ),
    "start_rate": Option(
        0.1,
        "share of the way that the initialization moves to a user's R after an episode",
        minimum=0.0,
        maximum=1.0,
    ),
    "retract_every": Option(
        0,
        "steps between making A and B orthonormal; 0: never, so that a preconditioner is learned",
        minimum=0,
    ),
    "batch_tokens": Option(
        MAX_BATCH_TOKENS, "tokens in one pass through the model, padding included", minimum=1
    ),
}

METHOD = Method(
    name=NAME,
    description="A, B and an initialization, learned over many users who each have an R of their own",
    paper="first-order MAML, ANIL, arXiv 1909.09157; Reptile, arXiv 1803.02999",
    factorise=gradient_factors,
    needs_calibration="labelled",
    options=OPTIONS,
    needs=gradient_needs,
    select=initial_part,
    refinement=plan_learning,
)
