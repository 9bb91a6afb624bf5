"""Ranks by module: the same training as with the modules' own ranks, in both forms, and zeros beyond them."""

from __future__ import annotations

import pytest
import torch

from tessera.errors import InvalidInput
from tessera.methods.bases import CalibrationSet, build_basis
from tessera.methods.scaling import Scaling
from tessera.model.base_model import BaseModel
from tests.trainer_worker.conftest import random_examples
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.lora.factors import initial_factors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.trainer import CoreRun, Trainer

PLAN = TrainingPlan(1, 4, 6, 1e-2, seed=3, patience=None, weight_decay=0.1, publish="last")
PATTERN = {"q_proj": 1, r"layers\.1\.mlp\.up_proj": 6}
ALPHA = Scaling(alpha=8)


def data() -> TrainingData:
    return TrainingData(random_examples(1, 12), random_examples(2, 4), digest="x")


def rank_of(name: str, default: int) -> int:
    return 1 if name.endswith("q_proj") else 6 if name.endswith("layers.1.mlp.up_proj") else default


def train(base: BaseModel, run: CoreRun | LoraRun) -> list[float]:
    """The training losses. All modules are trained."""
    if isinstance(run, CoreRun):
        trainer: Trainer | LoraTrainer = Trainer(base, run.basis, max_runs=1, token_budget=512)
        assert trainer.try_join(run)
    else:
        trainer = LoraTrainer(base, [run], token_budget=512)
    losses = []
    while not run.is_finished:
        losses += [update.train_loss for update in trainer.step() if update.train_loss is not None]
    trainer.leave(run.run_id)
    return losses


@pytest.mark.parametrize("method", ["lora_xs", "pissa", "milora", "random"])
def test_a_basis_has_each_module_at_its_own_rank(small: BaseModel, method: str) -> None:
    basis = build_basis(small, method=method, rank=3, rank_pattern=PATTERN)
    assert basis.rank == 6
    by_rank = {rank: build_basis(small, method=method, rank=rank) for rank in (1, 3, 6)}
    for index, module in enumerate(basis.manifest.modules):
        rank = rank_of(module.name, 3)
        torch.testing.assert_close(basis.A[index][:rank], by_rank[rank].A[index])
        torch.testing.assert_close(basis.B[index][:, :rank], by_rank[rank].B[index])
        assert not basis.A[index][rank:].any()
        assert not basis.B[index][:, rank:].any()

    run = CoreRun("x", data(), PLAN, basis, scaling=ALPHA)
    losses = train(small, run)
    assert losses[-1] != losses[0]
    for index, module in enumerate(basis.manifest.modules):
        rank = rank_of(module.name, 3)
        assert float(run.scale[index]) == pytest.approx(8 / rank)
        assert run.R[index, :rank, :rank].all()
        assert not run.R[index, rank:].any()
        assert not run.R[index, :, rank:].any()


@pytest.mark.parametrize("form", ["lora", "pissa", "lora_ga"])
def test_a_lora_form_has_each_module_at_its_own_rank(small: BaseModel, form: str) -> None:
    options = {}
    if form == "lora_ga":
        options["calibration"] = CalibrationSet.from_encoded(data().train)
    factors = initial_factors(small, form, rank=3, rank_pattern=PATTERN, scaling=ALPHA, **options)
    assert (factors.rank, max(factors.ranks), min(factors.ranks)) == (6, 6, 1)
    run = LoraRun("x", data(), PLAN, factors)
    losses = train(small, run)
    assert losses[-1] != losses[0]
    stored = run.to_result(small, {})
    assert stored.own_basis is not None
    for index, (A, B) in enumerate(run.trained(run.R)):
        rank = rank_of(factors.modules[index].name, 3)
        assert factors.scale_of(index) == pytest.approx(8 / rank)
        assert A[:rank].any()
        assert B[:, :rank].any()
        assert not A[rank:].any()
        assert not B[:, rank:].any()
        core = stored.adapter.R[index].double()
        change = factors.scale_of(index) * B.double() @ A.double()
        if factors.preset.is_subtracted:
            change -= factors.scale_of(index) * factors.B[index].double() @ factors.A[index].double()
        basis = stored.own_basis
        rebuilt = basis.B[index].double() @ core @ basis.A[index].double()
        torch.testing.assert_close(rebuilt, change, rtol=1e-4, atol=1e-6)


def test_what_cannot_work_is_refused(small: BaseModel) -> None:
    for make in (
        lambda: build_basis(small, method="loram", rank=3, rank_pattern=PATTERN),
        lambda: build_basis(small, rank=3, rank_pattern={"q_prj": 2}),
        lambda: build_basis(small, rank=3, rank_pattern={"(": 2}),
        lambda: initial_factors(small, "lolora", rank=3, rank_pattern=PATTERN),
    ):
        with pytest.raises(InvalidInput) as error:
            make()
        assert error.value.param == "rank_pattern"
