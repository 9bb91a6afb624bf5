"""How well newcomers do with a basis: R trained by the trainer itself, a sweep of rates, loss on held-out examples.

All newcomers at all rates train in one batch. Knows how nothing was built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapter_core.base_model import BaseModel
from adapter_core.basis import Basis
from adapter_core.chat_format import EncodedExample
from benchmarks.population_lora import LoraRun, LoraTrainer
from benchmarks.population_users import Newcomer
from trainer_worker.data import TrainingData
from trainer_worker.plan import TrainingPlan, auto_batch_size
from trainer_worker.run import TrainRun
from trainer_worker.train import Trainer

WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Regime:
    """How newcomers train, the same for every method. num_examples: at most; steps: optimisation steps."""

    num_examples: int
    steps: int
    batch_size: int
    seed: int = 0

    @classmethod
    def of(cls, num_examples: int, *, epochs: int, seed: int = 0) -> Regime:
        batch_size = auto_batch_size(num_examples)
        return cls(num_examples, epochs * -(-num_examples // batch_size), batch_size, seed)


@dataclass(frozen=True)
class Score:
    """losses: of each newcomer at the rate whose mean is best. by_rate: the mean loss of all at each rate."""

    rate: float
    losses: list[float]
    by_rate: dict[float, float]
    all_losses: dict[float, list[float]]

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)


def score_basis(
    base: BaseModel,
    basis: Basis,
    newcomers: Sequence[Newcomer],
    regime: Regime,
    rates: Sequence[float],
    *,
    token_budget: int,
    starts: Sequence[Tensor | None] | None = None,
) -> Score:
    """starts: the stored core [M, r, r] that each newcomer begins with; None is the base model."""
    starts = starts or [None] * len(newcomers)
    jobs = [(n, rate) for rate in rates for n in range(len(newcomers))]
    trainer = Trainer(base, basis, max_runs=len(jobs), token_budget=token_budget)
    for n, rate in jobs:
        data = _data(newcomers[n], regime)
        trainer.join(TrainRun(f"{n}/{rate}", data, _plan(regime, data, rate), basis, start=starts[n]))
    while any(not run.is_finished for run in trainer.runs):
        trainer.step()
    cores = [trainer.leave(f"{n}/{rate}").R for n, rate in jobs]
    losses = test_losses(base, basis, [newcomers[n].test for n, _ in jobs], cores, token_budget=token_budget)
    return _best(rates, losses, len(newcomers))


def score_lora(
    base: BaseModel,
    rank: int,
    newcomers: Sequence[Newcomer],
    regime: Regime,
    rates: Sequence[float],
    *,
    token_budget: int,
) -> tuple[Score, int]:
    """LoRA's score, and its number of trained parameters per user."""
    runs = []
    for rate in rates:
        for newcomer in newcomers:
            data = _data(newcomer, regime)
            runs.append(LoraRun(data, _plan(regime, data, rate), newcomer.test))
    trainer = LoraTrainer(base, rank, runs, token_budget=token_budget, seed=regime.seed)
    return _best(rates, trainer.train(), len(newcomers)), trainer.num_parameters


def test_losses(
    base: BaseModel,
    basis: Basis,
    tests: Sequence[Sequence[EncodedExample]],
    cores: Sequence[Tensor],
    *,
    token_budget: int,
) -> list[float]:
    """Mean loss per token of each set with its trained core R' [M, r, r]. A run of no steps evaluates only."""
    trainer = Trainer(base, basis, max_runs=len(cores), token_budget=token_budget)
    plan = TrainingPlan(1, 1, 0, 0.0, 0)
    for index, (test, core) in enumerate(zip(tests, cores, strict=True)):
        data = TrainingData(tuple(test), tuple(test), digest="")
        trainer.join(TrainRun(str(index), data, plan, basis, start=basis.fold(core.double())))
    trainer.step()
    return [run.progress.valid_loss or 0.0 for run in trainer.runs]


def base_losses(base: BaseModel, basis: Basis, newcomers: Sequence[Newcomer], *, token_budget: int) -> list[float]:
    zeros = torch.zeros(basis.num_modules, basis.rank, basis.rank)
    return test_losses(base, basis, [n.test for n in newcomers], [zeros] * len(newcomers), token_budget=token_budget)


def _data(newcomer: Newcomer, regime: Regime) -> TrainingData:
    return TrainingData(newcomer.train[: regime.num_examples], (), digest="")


def _plan(regime: Regime, data: TrainingData, rate: float) -> TrainingPlan:
    plan = TrainingPlan(
        num_epochs=1,
        batch_size=regime.batch_size,
        total_steps=regime.steps,
        learning_rate=rate,
        seed=regime.seed,
        warmup_steps=max(1, round(WARMUP_SHARE * regime.steps)),
        evaluate_every=regime.steps,
        patience=None,
    )
    return replace(plan)


def _best(rates: Sequence[float], losses: Sequence[float], num: int) -> Score:
    table = {rate: list(losses[i * num : (i + 1) * num]) for i, rate in enumerate(rates)}
    means = {rate: sum(row) / num for rate, row in table.items()}
    best = min(means, key=lambda rate: means[rate])
    return Score(best, table[best], means, table)
