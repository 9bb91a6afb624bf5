"""A run that continues from a checkpoint equals a run that was never interrupted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tessera.errors import Conflict, CorruptRecord
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tests.trainer_worker.conftest import MakeRun
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training import checkpoint
from trainer_worker.training.run import TrainRun
from trainer_worker.training.trainer import Trainer


def train(small: BaseModel, basis: Basis, run: TrainRun, *, steps: int | None = None) -> TrainRun:
    trainer = Trainer(small, basis, max_runs=1, token_budget=512)
    trainer.join(run)
    while not run.is_finished and (steps is None or run.progress.step < steps):
        trainer.step()
    trainer.leave(run.run_id)
    return run


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    small: BaseModel, small_basis: Basis, make_run: MakeRun, steps: int
) -> None:
    """Across epochs (3 steps each), evaluations and the moments of the optimizer."""
    plan = {"evaluate_every": 2, "patience": None, "warmup_steps": 2}
    whole = train(small, small_basis, make_run("a", **plan))
    content = checkpoint.to_bytes(train(small, small_basis, make_run("a", **plan), steps=steps))
    resumed = make_run("a", **plan)
    checkpoint.restore(resumed, content)
    assert resumed.progress.step == steps
    train(small, small_basis, resumed)
    for name in ("R", "m", "v", "best_R"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    assert resumed.progress == whole.progress


def test_a_snapshot_of_a_resident_run_does_not_move_with_it(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    run = make_run("a")
    trainer = Trainer(small, small_basis, max_runs=2, token_budget=512)
    trainer.join(run)
    trainer.step()
    content = checkpoint.to_bytes(run)
    R = run.R.clone()
    trainer.step()
    restored = make_run("a")
    checkpoint.restore(restored, content)
    assert torch.equal(restored.R, R)
    assert restored.progress.step == 1


def test_a_checkpoint_of_something_else_is_refused(make_run: MakeRun) -> None:
    content = checkpoint.to_bytes(make_run("a"))
    other_plan = make_run("a", learning_rate=0.5)
    other_data = make_run("a")
    other_data.data = TrainingData(other_data.data.train, other_data.data.valid, digest="other")
    for run in (other_plan, other_data):
        with pytest.raises(Conflict):
            checkpoint.restore(run, content)
        assert run.progress.step == 0


def test_damaged_bytes_are_refused_and_change_nothing(make_run: MakeRun) -> None:
    run = make_run("a")
    content = checkpoint.to_bytes(run)
    before = dataclasses.replace(run.progress)
    for damaged in (
        b"",
        b"abc",
        content[:50],
        content[:-1],
        b"\xff" * 100,
        content.replace(b"best_R", b"best_Q"),
    ):
        with pytest.raises(CorruptRecord):
            checkpoint.restore(run, damaged)
    assert run.progress == before
    assert not run.R.any()
