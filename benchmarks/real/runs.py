"""Trains many runs in shared passes and judges them on the test at every evaluation.

Knows no files and no report. The test decides nothing here: it is written down beside what the run sees.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from benchmarks.population.score import matmul_precision
from benchmarks.real.encoded import EncodedTask
from benchmarks.real.judge import Score, judge
from benchmarks.real.selection import Point
from tessera.model.base_model import BaseModel
from trainer_worker.training.plan import HasLearningRate, TrainingPlan, make_plan
from trainer_worker.training.run import RunUpdate, TrainRun


class SharedTrainer(Protocol):
    """`Trainer` or `LoraTrainer`."""

    def step(self) -> list[RunUpdate]: ...

    def attached(self, rows: Tensor | None = None) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Setting:
    """What is the same for all methods."""

    base: BaseModel
    #: Tokens with padding in one pass.
    token_budget: int
    #: Whether training passes may use TF32 on a GPU. What is judged never does.
    is_fast: bool = False
    #: Factors on the rate of the tables.
    multiples: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    #: Of full fine-tuning, where a run costs whole passes. The bundled model was better at ×10 than at ×3.
    full_multiples: Sequence[float] = (1.0, 3.0, 10.0, 30.0)
    #: Of all jobs; empty for the defaults.
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    #: Trained numbers in one trainer, each of which takes about 20 bytes.
    max_numbers: int = 150_000_000


@dataclass(frozen=True)
class Trial:
    """One training of one task."""

    run: TrainRun
    task: EncodedTask
    #: Of the rate in the tables; None for the automatic choice.
    multiple: float | None
    points: list[Point] = field(default_factory=list)


def train(setting: Setting, trainer: SharedTrainer, trials: Sequence[Trial]) -> None:
    """Train all trials to their ends and add their points. trials: in the order of the trainer's slots."""
    losses: dict[str, list[float]] = {trial.run.run_id: [] for trial in trials}
    slots = {trial.run.run_id: slot for slot, trial in enumerate(trials)}
    while active := [trial for trial in trials if not trial.run.is_finished]:
        due = [trial for trial in active if trial.run.needs_evaluation]
        for trial, point in measure(setting, trainer.attached, [(slots[t.run.run_id], t) for t in due]):
            seen = losses[trial.run.run_id]
            point |= {"step": trial.run.progress.step, "train_loss": statistics.mean(seen) if seen else None}
            trial.points.append(point)
            seen.clear()
        with matmul_precision(is_fast=setting.is_fast):
            for update in trainer.step():
                if update.train_loss is not None:
                    losses[update.run_id].append(update.train_loss)


def plan_of(
    setting: Setting, task: EncodedTask, kind: HasLearningRate, multiple: float | None
) -> TrainingPlan:
    """Return the plan of a job with the defaults; a fixed multiple of its rate runs to its end."""
    plan = make_plan(
        setting.hyperparameters, None, num_examples=task.data.num_train, kind=kind, seed=setting.seed
    )
    if multiple is None:
        return plan
    return dataclasses.replace(plan, learning_rate=multiple * plan.learning_rate, patience=None)


def measure(
    setting: Setting,
    attach: Callable[[Tensor], AbstractContextManager[None]],
    trials: Sequence[tuple[int, Trial]],
) -> Iterable[tuple[Trial, Point]]:
    """Judge the present states of (slot, trial) pairs on what was held back and on the test."""
    sets = [(slot, trial.task.test) for slot, trial in trials]
    with_valid = [(slot, trial) for slot, trial in trials if trial.task.data.valid]
    sets += [(slot, trial.task.data.valid) for slot, trial in with_valid]
    if not sets:
        return []
    scores = judge(setting.base.model, attach, sets, token_budget=setting.token_budget)
    valid = dict(zip((slot for slot, _ in with_valid), scores[len(trials) :], strict=True))
    tests = scores[: len(trials)]
    return [
        (trial, to_point(test, valid.get(slot))) for (slot, trial), test in zip(trials, tests, strict=True)
    ]


def to_point(test: Score, valid: Score | None) -> Point:
    return {
        "valid_loss": None if valid is None else valid.loss,
        "valid_exact": None if valid is None else valid.exact,
        "test_loss": test.loss,
        "test_exact": test.exact,
    }
