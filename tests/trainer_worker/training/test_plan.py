"""From hyperparameters to a plan."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tessera.errors import InvalidInput
from trainer_worker.training.learning_rates import BasisKind
from trainer_worker.training.plan import TrainingPlan, make_plan, max_example_tokens

XS = BasisKind("lora_xs", rank=16, gain=3.0)


def plan(num_examples: int = 225, stopping: dict[str, Any] | None = None, **given: Any) -> TrainingPlan:
    return make_plan(given, stopping, num_examples=num_examples, kind=XS, seed=1)


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "epochs", "steps"),
    [
        (1, 1, 15, 15),
        (8, 1, 15, 120),
        (45, 5, 15, 135),
        (225, 8, 3, 87),
        (1000, 8, 1, 125),
        (10_000, 8, 1, 1250),
    ],
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
        ({"learning_rate": 0}, "hyperparameters.learning_rate"),
        ({"learning_rate": "fast"}, "hyperparameters.learning_rate"),
        (
            {"learning_rate": 1e-3, "learning_rate_multiplier": 2},
            "hyperparameters.learning_rate_multiplier",
        ),
        ({"lr_scheduler_type": "polynomial"}, "hyperparameters.lr_scheduler_type"),
        ({"lr_scheduler_type": 3}, "hyperparameters.lr_scheduler_type"),
        ({"warmup_ratio": 1.1}, "hyperparameters.warmup_ratio"),
        ({"warmup_ratio": True}, "hyperparameters.warmup_ratio"),
        ({"weight_decay": -0.1}, "hyperparameters.weight_decay"),
        ({"warmup": 0.1}, "hyperparameters.warmup"),
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


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("cosine_with_min_lr", 0.55, 0.1), ("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)],
)
def test_a_schedule_follows_the_warm_up(schedule: str, middle: float, end: float) -> None:
    made = plan(1000, n_epochs=8, lr_scheduler_type=schedule, learning_rate=2.0, warmup_ratio=0.5)
    total, warmup = made.total_steps, made.warmup_steps
    assert (total, warmup) == (1000, 500)
    assert made.learning_rate_at(warmup - 1) == made.learning_rate_at(warmup) == 2.0
    assert made.learning_rate_at(750) == pytest.approx(2.0 * middle)
    assert made.learning_rate_at(999) == pytest.approx(2.0 * end, abs=2e-2)


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    made = plan(warmup_ratio=0, lr_scheduler_type="linear")
    assert made.learning_rate_at(0) == made.learning_rate


def test_a_share_of_weight_decay_and_a_length_are_taken_as_they_are() -> None:
    assert plan().weight_decay == 0.0
    assert plan(weight_decay=0.25).weight_decay == 0.25
    assert max_example_tokens({}, 512) == max_example_tokens({"max_length": "auto"}, 512) == 512
    assert max_example_tokens({"max_length": 64}, 512) == 64
    assert max_example_tokens({"max_length": 4096}, 512) == 512
    with pytest.raises(InvalidInput) as caught:
        max_example_tokens({"max_length": 0}, 512)
    assert caught.value.param == "hyperparameters.max_length"
