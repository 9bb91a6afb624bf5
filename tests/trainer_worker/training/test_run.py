"""The rules of a run, without a model: the best state, early stopping, losses that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.errors import InvalidInput
from tessera.formats.basis import Basis
from tests.trainer_worker.conftest import MakeRun
from trainer_worker.training.objectives.objective import Measured
from trainer_worker.training.run import TrainRun
from trainer_worker.training.trainer import CoreRun


def evaluate(run: TrainRun, *losses: float) -> None:
    """Record these evaluations, with one step and a change of R between them."""
    for loss in losses:
        run.record_evaluation(Measured(loss, 0.0))
        if not run.is_finished:
            run.R += 1
            run.record_step(train_loss=1.0, num_tokens=5)


def test_the_best_state_is_kept(make_run: MakeRun) -> None:
    run = make_run("a", total_steps=5, patience=None)
    evaluate(run, 3.0, 2.0, 2.5, 2.2, 2.1, 2.05)
    assert run.progress.finish_reason == "completed"
    assert (run.progress.best_step, run.progress.best_valid_loss) == (1, 2.0)
    assert run.progress.initial_valid_loss == 3.0
    assert torch.equal(run.best_R, torch.ones_like(run.best_R))
    assert run.progress.trained_tokens == 25


def test_patience_ends_a_run_early(make_run: MakeRun) -> None:
    run = make_run("a", total_steps=50, patience=2)
    evaluate(run, 3.0, 2.0, 2.1, 1.9, 2.0)
    assert not run.is_finished
    evaluate(run, 1.95)
    assert run.progress.finish_reason == "early_stop"
    assert run.progress.best_valid_loss == 1.9


def test_min_delta_asks_for_more_than_a_little(make_run: MakeRun) -> None:
    run = make_run("a", total_steps=50, patience=2, min_delta=0.1)
    evaluate(run, 3.0, 2.95, 2.92)
    assert run.progress.finish_reason == "early_stop"
    assert run.progress.best_step == 2, "the lowest loss counts, however small the gain"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(make_run: MakeRun, bad: float) -> None:
    run = make_run("a", total_steps=50, patience=None)
    evaluate(run, 3.0, bad, 2.9, bad)
    assert run.progress.best_valid_loss == 2.9
    first_bad = make_run("b", total_steps=50, patience=None)
    evaluate(first_bad, bad, 2.5)
    assert first_bad.progress.best_valid_loss == 2.5


def test_an_evaluation_is_due_once_per_step(make_run: MakeRun) -> None:
    run = make_run("a", total_steps=7, evaluate_every=3)
    due = []
    for _ in range(7):
        due.append(run.needs_evaluation)
        if run.needs_evaluation:
            run.record_evaluation(None)
            assert not run.needs_evaluation
        run.record_step(1.0, 1)
    assert due == [True, False, False, True, False, False, True]
    assert run.needs_evaluation, "the end"


def test_three_steps_that_are_not_finite(make_run: MakeRun) -> None:
    run = make_run("a")
    run.record_evaluation(Measured(2.0, 0.0))
    run.R += 1
    run.m += 1
    run.record_step(1.0, 1)
    rate = run.learning_rate
    assert run.record_nonfinite()[0] == "nonfinite_skipped"
    assert run.R.all()
    assert run.record_nonfinite()[0] == "nonfinite_rolled_back"
    assert not run.R.any()
    assert not run.m.any()
    assert run.progress.num_updates == 0
    assert run.learning_rate < 0.6 * rate
    assert run.record_nonfinite()[0] == "training_diverged"
    assert run.progress.finish_reason == "diverged"
    assert run.progress.step == 4


def test_a_start_of_another_shape_is_refused(make_run: MakeRun, small_basis: Basis) -> None:
    like = make_run("a")
    with pytest.raises(InvalidInput) as caught:
        CoreRun("x", like.data, like.plan, small_basis, start=torch.zeros(2, 3, 3))
    assert caught.value.param == "warm_start_from"
