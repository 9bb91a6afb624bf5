"""What hyper-parameters come to."""

from __future__ import annotations

import math
from typing import Any

import pytest

from adapter_core.errors import InvalidInput
from trainer_worker.plan import BasisKind, TrainingPlan, make_plan

XS = BasisKind("lora_xs", rank=16, gain=3.0)


def plan(num_examples: int = 225, stopping: dict[str, Any] | None = None, **given: Any) -> TrainingPlan:
    return make_plan(given, stopping, num_examples=num_examples, kind=XS, seed=1)


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "epochs", "steps"),
    [(1, 1, 5, 5), (8, 1, 5, 40), (45, 5, 5, 45), (225, 8, 3, 87), (1000, 8, 1, 125), (10_000, 8, 1, 1250)],
)
def test_auto_gives_about_a_hundred_steps(
    num_examples: int, batch_size: int, epochs: int, steps: int
) -> None:
    for given in ({}, {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}):
        made = plan(num_examples, **given)
        assert (made.batch_size, made.num_epochs, made.total_steps) == (batch_size, epochs, steps)


def test_numbers_are_taken_as_they_are() -> None:
    made = plan(
        10, {"patience": None, "min_delta": 0.1}, n_epochs=3, batch_size=4, learning_rate_multiplier=0.5
    )
    assert (made.num_epochs, made.batch_size, made.total_steps) == (3, 4, 9)
    assert made.learning_rate == pytest.approx(XS.learning_rate / 2)
    assert (made.patience, made.min_delta) == (None, 0.1)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n_epochs": 0}, "hyperparameters.n_epochs"),
        ({"n_epochs": 51}, "hyperparameters.n_epochs"),
        ({"n_epochs": 1.5}, "hyperparameters.n_epochs"),
        ({"n_epochs": True}, "hyperparameters.n_epochs"),
        ({"n_epochs": math.nan}, "hyperparameters.n_epochs"),
        ({"batch_size": "big"}, "hyperparameters.batch_size"),
        ({"batch_size": 257}, "hyperparameters.batch_size"),
        ({"learning_rate_multiplier": 0}, "hyperparameters.learning_rate_multiplier"),
        ({"learning_rate_multiplier": math.inf}, "hyperparameters.learning_rate_multiplier"),
        ({"learning_rate": 1e-3}, "hyperparameters.learning_rate"),
        ({"stopping": {"patience": 0}}, "early_stopping.patience"),
        ({"stopping": {"min_delta": -1}}, "early_stopping.min_delta"),
        ({"stopping": {"patients": 2}}, "early_stopping.patients"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        plan(**given)
    assert caught.value.param == param


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    made = plan(225)
    rates = [made.learning_rate_at(step) for step in range(made.total_steps)]
    assert made.warmup_steps == 4
    assert rates[0] == pytest.approx(made.learning_rate / 4)
    assert max(rates) == pytest.approx(made.learning_rate)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(made.learning_rate / 10, rel=0.05)


def test_a_run_of_one_step_has_a_rate() -> None:
    made = plan(1, n_epochs=1)
    assert made.learning_rate_at(0) == made.learning_rate
