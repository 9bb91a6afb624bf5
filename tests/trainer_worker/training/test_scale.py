"""s of a job in the r x r form: the same as a basis that was built with it, for each run by itself."""

from __future__ import annotations

import pytest
import torch

from tessera.formats.basis import Basis
from tessera.methods.bases import build_basis
from tessera.methods.scaling import NO_SCALING, Scaling
from tessera.model.base_model import BaseModel
from tests.trainer_worker.conftest import random_examples
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.learning_rates import BasisKind, LoraKind
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.trainer import CoreRun, Trainer

PLAN = TrainingPlan(1, 4, total_steps=6, learning_rate=1e-2, seed=3, patience=None)


def run_in(
    basis: Basis, name: str, scaling: Scaling = NO_SCALING, start: torch.Tensor | None = None
) -> CoreRun:  # fmt: skip
    data = TrainingData(random_examples(1, 12), random_examples(2, 4), digest=name)
    return CoreRun(name, data, PLAN, basis, start=start, scaling=scaling)


def train(base: BaseModel, basis: Basis, *runs: CoreRun) -> list[torch.Tensor]:
    """The cores that are published."""
    trainer = Trainer(base, basis, max_runs=len(runs) + 1, token_budget=512)
    for run in runs:
        trainer.join(run)
    while not all(run.is_finished for run in runs):
        trainer.step()
    for run in runs:
        trainer.leave(run.run_id)
    return [run.to_result(base, {}).adapter.R for run in runs]


def test_the_same_as_a_basis_built_with_it_beside_a_run_without(small: BaseModel) -> None:
    plain, scaled = build_basis(small, rank=4), build_basis(small, rank=4, scale=3.0)
    [expected_scaled], [expected_plain] = (
        train(small, basis, run_in(basis, "x")) for basis in (scaled, plain)
    )

    by_scale, alone, by_alpha, by_root = train(
        small,
        plain,
        run_in(plain, "a", Scaling(scale=3.0)),
        run_in(plain, "b"),
        run_in(plain, "c", Scaling(alpha=12.0)),
        run_in(plain, "d", Scaling(alpha=6.0, use_rslora=True)),
    )

    assert not torch.allclose(expected_scaled, expected_plain, rtol=1e-2)
    for core in (by_scale, by_alpha, by_root):
        torch.testing.assert_close(core, expected_scaled, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(alone, expected_plain, rtol=1e-5, atol=1e-7)
    [again] = train(small, scaled, run_in(scaled, "x", Scaling(scale=1.0)))
    torch.testing.assert_close(again, expected_plain, rtol=1e-5, atol=1e-7)


def test_what_training_begins_with_does_not_depend_on_it(small: BaseModel, small_basis: Basis) -> None:
    stored = 0.1 * torch.randn(len(small_basis.A), 4, 4, generator=torch.Generator().manual_seed(2))
    for scaling in (Scaling(), Scaling(scale=5.0)):
        run = run_in(small_basis, "x", scaling, start=stored)
        torch.testing.assert_close(run.to_result(small, {}).adapter.R, stored, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_belongs_to_one_scale(small_basis: Basis) -> None:
    identities = {run_in(small_basis, "x", Scaling(scale=s)).identity for s in (1.0, 2.0, 3.0)}
    assert len(identities) == 3
    assert small_basis.basis_id in identities, "as in checkpoints of runs that say nothing about s"


def test_the_automatic_rate_is_that_of_s_times_the_rate(small_basis: Basis) -> None:
    """Under Adam, s in front of R or B A is a learning rate."""
    runs = [run_in(small_basis, "x", Scaling(scale=s)) for s in (1.0, 4.0)]
    rates = [BasisKind.of(small_basis, scale=run.scale).learning_rate for run in runs]
    assert rates[0] == pytest.approx(4 * rates[1])
    assert LoraKind("lora", 8).learning_rate == pytest.approx(4 * LoraKind("lora", 8, 4.0).learning_rate)
    assert LoraKind("rslora", 4).learning_rate == LoraKind("rslora", 4, 2.0).learning_rate
