"""Trials decide how long a population is learned: users who never teach play newcomers.

At a few points of the learning, all of them begin with R = S and train R alone on a part of their examples,
with A and B frozen as they are then. Their mean loss on the rest of their examples is the loss of that point.
The state with the lowest loss is the result, and learning ends when the loss has risen twice in a row.

This file knows neither how A and B are learned nor how a basis is stored.
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

#: Number of points with a trial, beside the one before learning begins.
POINTS = 8
#: The steps of all trials together, at most, as a share of the steps of learning. A step of a trial has at
#: most as many examples as one of learning, and no gradients of A and B.
SHARE_OF_STEPS = 0.2
#: The least number of steps of a trial. After fewer, a newcomer has hardly left S, so there are fewer points
#: instead.
MIN_STEPS = 8
#: Examples for a trial's loss, as a multiple of those of a step. They are forward passes only, and take the
#: time of about 1.3 steps.
TEST_BATCHES = 4

Factors = dict[ModuleShape, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrialPlan:
    """When there are trials, and how long each one is."""

    #: The steps of learning after which there is a trial.
    points: tuple[int, ...]
    #: Steps of each newcomer's R in a trial.
    steps: int
    #: Examples of each newcomer in a step.
    batch_size: int

    @property
    def num_steps(self) -> int:
        """Steps of all trials together."""
        return len(self.points) * self.steps

    @classmethod
    def of(cls, plan: LearningPlan, num_newcomers: int) -> TrialPlan:
        """Plan trials that fit in `SHARE_OF_STEPS`; a short learning gets one all the same."""
        if not num_newcomers:
            return cls((), 0, 0)
        budget = SHARE_OF_STEPS * plan.steps
        num = max(1, min(POINTS, int(budget / MIN_STEPS) - 1))
        steps = min(plan.episode_steps, max(MIN_STEPS, int(budget / (num + 1))))
        points = tuple(round(index * plan.steps / num) for index in range(num + 1))
        return cls(points, steps, max(1, plan.num_slots * plan.batch_size // num_newcomers))


@dataclass(frozen=True)
class State:
    """A, B and S after some steps of learning, on the CPU."""

    step: int
    factors: Factors
    #: S [M, r, r]
    start: Tensor
    #: The newcomers' mean loss.
    loss: float

    def on(self, device: torch.device) -> Factors:
        """Return A and B on this device."""
        return {shape: (A.to(device), B.to(device)) for shape, (A, B) in self.factors.items()}


class Trials:
    """Holds the trials, and keeps the best state so far."""

    def __init__(
        self, base: BaseModel, factors: SharedFactors, newcomers: Sequence[CalibrationSet], plan: LearningPlan
    ) -> None:
        """newcomers: held-out users with at least two examples each. plan: that of the learning."""
        self._base, self._shared = base, factors
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
        """Whether the loss rose at each of the last two points."""
        last = [loss for _, loss in self.curve[-3:]]
        return len(last) == 3 and last[0] < last[1] < last[2]

    def hold(self, step: int, start: Tensor, progress: Callable[[], None]) -> None:
        """Hold the trial after `step` steps, if there is one, and keep the state if it is the best so far.

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
            tensors = self._shared.tensors()
            factors = {shape: (A.cpu(), B.cpu()) for shape, (A, B) in tensors.items()}
            self.best = State(step, factors, start.detach().cpu().clone(), loss)

    def account(self) -> dict[str, Any] | None:
        """Return the recipe's record; None without newcomers. curve: [step of learning, newcomers' loss]."""
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
    """Split the examples of a user, at least two, into (training, test); at most half are for the test."""
    order = torch.randperm(len(user), generator=torch.Generator().manual_seed(seed)).tolist()
    num_test = min(max_test, len(user) // 2)
    test = tuple(user.examples[index] for index in sorted(order[:num_test]))
    train = tuple(user.examples[index] for index in sorted(order[num_test:]))
    return CalibrationSet(train), CalibrationSet(test)
