"""How far newcomers get with a basis (the trainer itself trains R) and with LoRA, over a sweep of rates.

All newcomers, sizes, initializations, rates and seeds train in the same batches. The loss is that on the
newcomer's test examples after the last step, in full float32. This file does not know how a basis was built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.population.users import Newcomer
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.lora.factors import LoraFactors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer
from trainer_worker.training.plan import TrainingPlan, auto_batch_size, auto_epochs
from trainer_worker.training.run import TrainRun
from trainer_worker.training.trainer import CoreRun, Trainer

WARMUP_SHARE = 0.05
#: LoRA's trained numbers at once, about 20 bytes each.
MAX_NUMBERS = 150_000_000


Run = TypeVar("Run", bound=TrainRun)


@dataclass(frozen=True)
class Job:
    """One training of one newcomer, with so many of the examples, another part of them for every seed."""

    newcomer: Newcomer
    num_examples: int
    seed: int
    rate: float
    start: str = "zero"

    @property
    def name(self) -> str:
        return f"{self.newcomer.name}/{self.num_examples}/{self.seed}/{self.start}/{self.rate:g}"

    def data(self) -> TrainingData:
        user = self.newcomer
        order = torch.randperm(len(user.train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        chosen = tuple(user.train[i] for i in order[: self.num_examples])
        return TrainingData(chosen, user.test, digest="")

    def plan(self, num_examples: int) -> TrainingPlan:
        """What the service chooses for so many examples, but for the rate, and without early stopping."""
        batch_size = auto_batch_size(num_examples)
        per_epoch = -(-num_examples // batch_size)
        epochs = auto_epochs(per_epoch)
        total = epochs * per_epoch
        return TrainingPlan(
            num_epochs=epochs,
            batch_size=batch_size,
            total_steps=total,
            learning_rate=self.rate,
            seed=self.seed,
            warmup_steps=max(1, round(WARMUP_SHARE * total)),
            evaluate_every=total,
            patience=None,
        )

    def record(self, run: TrainRun) -> dict[str, Any]:
        """loss: None if it is not finite."""
        progress = run.progress
        return {
            "newcomer": self.newcomer.name,
            "num_examples": self.num_examples,
            "seed": self.seed,
            "start": self.start,
            "rate": self.rate,
            "first_loss": progress.initial_valid_loss,
            "loss": progress.valid_loss if progress.finish_reason == "completed" else None,
        }


def train_cores(
    base: BaseModel,
    basis: Basis,
    jobs: Sequence[Job],
    start: Callable[[Job], Tensor | None],
    *,
    token_budget: int,
    is_fast: bool,
) -> Iterator[dict[str, Any]]:
    """All jobs in one basis; a record of each as it ends. start: the stored core that a job begins with."""
    runs = []
    for job in jobs:
        data = job.data()
        runs.append(CoreRun(job.name, data, job.plan(len(data.train)), basis, start=start(job)))
    trainer = Trainer(base, basis, max_runs=len(runs), token_budget=token_budget)
    for run in runs:
        trainer.join(run)
    by_name = {job.name: job for job in jobs}
    for run in drive(trainer.step, runs, is_fast=is_fast):
        yield by_name[run.run_id].record(run)


def train_lora(
    base: BaseModel, factors: LoraFactors, jobs: Sequence[Job], *, token_budget: int, is_fast: bool
) -> Iterator[dict[str, Any]]:
    """All jobs with A and B trained from `factors`; a record of each as it ends."""
    runs: list[LoraRun] = []
    for job in jobs:
        data = job.data()
        runs.append(LoraRun(job.name, data, job.plan(len(data.train)), factors))
    by_name = {job.name: job for job in jobs}
    size = max(1, MAX_NUMBERS // (2 * runs[0].layout.width))
    for first in range(0, len(runs), size):
        part = runs[first : first + size]
        minimum = 0 if base.device.type == "cpu" else token_budget
        trainer = LoraTrainer(base, part, token_budget=token_budget, min_tokens=minimum)
        for run in drive(trainer.step, part, is_fast=is_fast):
            yield by_name[run.run_id].record(run)


def drive(step: Callable[[], object], runs: Sequence[Run], *, is_fast: bool) -> Iterator[Run]:
    """Step until all runs have ended, and give each as it does; its last evaluation is in full float32."""
    active = list(runs)
    while active:
        is_last = any(run.progress.step >= run.plan.total_steps for run in active)
        with matmul_precision(is_fast=is_fast and not is_last):
            step()
        yield from (run for run in active if run.is_finished)
        active = [run for run in active if not run.is_finished]


@contextmanager
def matmul_precision(*, is_fast: bool) -> Iterator[None]:
    """Matrix products in TF32 while this lasts, if asked for and the device has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if is_fast else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def base_losses(
    base: BaseModel, basis: Basis, newcomers: Sequence[Newcomer], *, token_budget: int
) -> list[float]:
    """Of the untrained model, per newcomer. A run of no steps is an evaluation."""
    trainer = Trainer(base, basis, max_runs=len(newcomers), token_budget=token_budget)
    for newcomer in newcomers:
        data = TrainingData(newcomer.test, newcomer.test, digest="")
        trainer.join(CoreRun(newcomer.name, data, TrainingPlan(1, 1, 0, 0.0, 0), basis))
    trainer.step()
    return [run.progress.valid_loss or 0.0 for run in trainer.runs]
