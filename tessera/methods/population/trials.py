"""How far learning from a population is to go: users who never teach play newcomers and say so.

At a few points of the learning, all of them begin with R = S and train R alone, on a part of their examples,
with A and B frozen as they are then. Their mean loss on the rest of their examples is the point's. The state
with the lowest one is the result; where the loss has risen twice in a row, learning has gone too far.

Knows neither how A and B are learned nor how a basis is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tessera.formats.manifest import ModuleShape
from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.population.factors import SharedFactors
from tessera.methods.population.learner import Learner, LearningPlan
from tessera.model.base_model import BaseModel

#: Points of the learning with a trial, and one before it begins.
POINTS = 8
#: All trials take at most so many of the steps of learning; a trial's step has as many examples as one of
#: learning's at most, and no gradients of A and B.
SHARE_OF_STEPS = 0.2
#: With fewer a newcomer has hardly left S, so there are fewer points instead.
MIN_STEPS = 8
#: The loss is of so many examples as this times those of a step, forward only: about 1.3 steps' time.
TEST_BATCHES = 4

Factors = dict[ModuleShape, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrialPlan:
    """points: steps of learning after which there is a trial. steps: of each newcomer's R in a trial."""

    points: tuple[int, ...]
    steps: int
    batch_size: int

    @property
    def num_steps(self) -> int:
        """Of all trials together."""
        return len(self.points) * self.steps

    @classmethod
    def of(cls, plan: LearningPlan, num_newcomers: int) -> TrialPlan:
        """What fits in the share of the steps; of few steps it is more than the share."""
        if not num_newcomers:
            return cls((), 0, 0)
        budget = SHARE_OF_STEPS * plan.steps
        num = max(1, min(POINTS, int(budget / MIN_STEPS) - 1))
        steps = min(plan.episode_steps, max(MIN_STEPS, int(budget / (num + 1))))
        points = tuple(round(index * plan.steps / num) for index in range(num + 1))
        return cls(points, steps, max(1, plan.num_slots * plan.batch_size // num_newcomers))


@dataclass(frozen=True)
class State:
    """A, B and S after so many steps, on the CPU; loss: the newcomers'."""

    step: int
    factors: Factors
    start: Tensor
    loss: float

    def on(self, device: torch.device) -> Factors:
        return {shape: (A.to(device), B.to(device)) for shape, (A, B) in self.factors.items()}


class Trials:
    """The newcomers, and the best state that they have seen."""

    def __init__(
        self, base: BaseModel, factors: SharedFactors, newcomers: Sequence[CalibrationSet], plan: LearningPlan
    ) -> None:
        """newcomers: each with two examples at least. plan: of the learning."""
        self._base, self._taught = base, factors
        self.plan = TrialPlan.of(plan, len(newcomers))
        num = len(newcomers)
        self._episode = replace(
            plan,
            steps=self.plan.steps,
            episode_steps=self.plan.steps,
            num_slots=num,
            batch_size=self.plan.batch_size,
        )
        max_test = max(1, TEST_BATCHES * self.plan.batch_size)
        parts = [divide(user, max_test, seed=plan.seed) for user in newcomers]
        self._train, self._test = [train for train, _ in parts], [test for _, test in parts]
        self._factors = factors.frozen(num_slots=num) if newcomers else factors
        self.curve: list[tuple[int, float]] = []
        self.best: State | None = None

    @property
    def have_risen(self) -> bool:
        """Whether the last two points each are worse than the one before."""
        last = [loss for _, loss in self.curve[-3:]]
        return len(last) == 3 and last[0] < last[1] < last[2]

    def hold(self, step: int, start: Tensor, progress: Callable[[], None]) -> None:
        """If there is a point after `step` steps, let the newcomers try S, and keep the state if it is best.

        start: S [M, r, r] in the coordinates of the factors. progress: called after each step of R. Raises
        `InvalidInput` if a loss is not finite.
        """
        if step not in self.plan.points:
            return
        learner = Learner(self._base, self._factors, self._train, self._episode, start=start)
        for _ in range(self.plan.steps):
            learner.step_cores()
            progress()
        loss = learner.loss_on(self._test)
        self.curve.append((step, loss))
        if self.best is None or loss < self.best.loss:
            tensors = self._taught.tensors()
            factors = {shape: (A.cpu(), B.cpu()) for shape, (A, B) in tensors.items()}
            self.best = State(step, factors, start.detach().cpu().clone(), loss)

    def account(self) -> dict[str, Any] | None:
        """For the recipe; None without newcomers. curve: [step of learning, the newcomers' loss]."""
        if self.best is None:
            return None
        return {
            "num_users": len(self._train),
            "examples_to_train": [min(map(len, self._train)), max(map(len, self._train))],
            "examples_to_test": [min(map(len, self._test)), max(map(len, self._test))],
            "steps": self.plan.steps,
            "batch_size": self.plan.batch_size,
            "curve": [list(point) for point in self.curve],
            "best_step": self.best.step,
        }


def divide(user: CalibrationSet, max_test: int, *, seed: int) -> tuple[CalibrationSet, CalibrationSet]:
    """(to train on, to test with) of a user of two examples or more; at most half are for the test."""
    order = torch.randperm(len(user), generator=torch.Generator().manual_seed(seed)).tolist()
    num = min(max_test, len(user) // 2)
    test, train = (tuple(user.examples[i] for i in sorted(part)) for part in (order[:num], order[num:]))
    return CalibrationSet(train), CalibrationSet(test)
