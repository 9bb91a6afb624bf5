"""From a job's hyperparameters to its plan: batch size, epochs, learning rate, schedule, evaluations.

Knows the number of examples and what is trained (`learning_rates.py`), but neither model nor data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tessera.errors import InvalidInput
from tessera.queue.records import HYPERPARAMETERS

MAX_EPOCHS = 50
MAX_BATCH_SIZE = 256
#: Tokens; larger than the context of any model.
MAX_LENGTH = 2**20
MAX_PATIENCE = 1000
AUTO_BATCH_SIZE = 8
#: A small file is split into at least this many batches.
MIN_AUTO_BATCHES = 8
#: The number of epochs is chosen to give about this many steps. In measurement (a) of `learning_rates.py` the
#: loss was 4.271 and 4.269 after 60 steps, 4.267 and 4.238 after 120, and no better after 240.
AUTO_STEPS = 90
#: With 50 examples the validation loss was lowest after 3 to 5 epochs.
MAX_AUTO_EPOCHS = 5

WARMUP_SHARE = 0.05
#: The default schedule ends at this fraction of the peak.
FINAL_SHARE = 0.1
DEFAULT_SCHEDULE = "cosine_with_min_lr"
MAX_GRAD_NORM = 1.0
NUM_EVALUATIONS = 8
PATIENCE = 2

_LEAST, _LARGEST = math.ulp(0.0), sys.float_info.max
#: By name of a number: its type, the least and the largest value, and both in words.
_NUMBERS: Mapping[str, tuple[type[int] | type[float], float, float, str]] = {
    "n_epochs": (int, 1, MAX_EPOCHS, f"a whole number from 1 to {MAX_EPOCHS}"),
    "batch_size": (int, 1, MAX_BATCH_SIZE, f"a whole number from 1 to {MAX_BATCH_SIZE}"),
    "max_length": (int, 1, MAX_LENGTH, f"a whole number from 1 to {MAX_LENGTH}"),
    "patience": (int, 1, MAX_PATIENCE, f"a whole number from 1 to {MAX_PATIENCE}"),
    "learning_rate": (float, _LEAST, _LARGEST, "a number above 0"),
    "learning_rate_multiplier": (float, _LEAST, _LARGEST, "a number above 0"),
    "min_delta": (float, 0, _LARGEST, "a number of at least 0"),
    "warmup_ratio": (float, 0, 1, "a number from 0 to 1"),
    "weight_decay": (float, 0, 1, "a number from 0 to 1"),
}


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


#: Functions, by their names in transformers, from the part of the steps after the warm-up that is done to the
#: fraction of the peak learning rate.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    DEFAULT_SCHEDULE: lambda done: FINAL_SHARE + (1 - FINAL_SHARE) * _cosine(done),
    "cosine": _cosine,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that determines a run except its data."""

    num_epochs: int
    #: Number of examples.
    batch_size: int
    total_steps: int
    #: The peak of the schedule.
    learning_rate: float
    seed: int
    warmup_steps: int = 1
    #: Steps between two evaluations. The first and the last step are evaluated as well.
    evaluate_every: int = 1
    #: Evaluations that may pass without an improvement by more than min_delta; None: never stop early.
    patience: int | None = PATIENCE
    #: Nats per token.
    min_delta: float = 0.0
    max_grad_norm: float = MAX_GRAD_NORM
    weight_decay: float = 0.0
    #: One of `SCHEDULES`.
    schedule: str = DEFAULT_SCHEDULE
    #: The automatic rate for this method and number of examples, of which learning_rate is a multiple; None
    #: if nobody knows it.
    automatic_rate: float | None = None

    def learning_rate_at(self, step: int) -> float:
        """Return the rate of the 0-based `step`: a linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.learning_rate * SCHEDULES[self.schedule](min(1.0, done))


class HasLearningRate(Protocol):
    """`BasisKind` or `LoraKind`."""

    def rate_for(self, num_examples: int) -> float: ...


def make_plan(
    hyperparameters: Mapping[str, Any],
    early_stopping: Mapping[str, Any] | None,
    *,
    num_examples: int,
    kind: HasLearningRate,
    seed: int,
) -> TrainingPlan:
    """Return the plan for `num_examples` training examples.

    hyperparameters: those in `HYPERPARAMETERS`, each a value, "auto" or absent. A learning_rate replaces the
    automatic one; max_length concerns the data and is ignored here.
    early_stopping: {patience, min_delta}, both optional; None takes the defaults. Raises `InvalidInput`.
    """
    _refuse_unknown(hyperparameters, HYPERPARAMETERS, "hyperparameters")
    stopping = {"patience": PATIENCE, "min_delta": 0.0, **(early_stopping or {})}
    _refuse_unknown(stopping, ("patience", "min_delta"), "early_stopping")
    batch_size = _number(hyperparameters, "batch_size") or auto_batch_size(num_examples)
    steps_per_epoch = math.ceil(num_examples / batch_size)
    num_epochs = _number(hyperparameters, "n_epochs") or auto_epochs(steps_per_epoch)
    total_steps = num_epochs * steps_per_epoch
    warmup_share = _number(hyperparameters, "warmup_ratio")
    if warmup_share is None:
        warmup_steps = max(1, round(WARMUP_SHARE * total_steps))
    else:
        warmup_steps = math.ceil(warmup_share * total_steps)
    automatic_rate = kind.rate_for(num_examples)
    patience = stopping["patience"]
    if patience is not None:
        patience = _number(stopping, "patience", "early_stopping") or PATIENCE
    return TrainingPlan(
        num_epochs=num_epochs,
        batch_size=batch_size,
        total_steps=total_steps,
        learning_rate=_learning_rate(hyperparameters, automatic_rate),
        seed=seed,
        warmup_steps=warmup_steps,
        evaluate_every=max(1, math.ceil(total_steps / NUM_EVALUATIONS)),
        patience=patience,
        min_delta=_number(stopping, "min_delta", "early_stopping") or 0.0,
        weight_decay=_number(hyperparameters, "weight_decay") or 0.0,
        schedule=_schedule(hyperparameters),
        automatic_rate=automatic_rate,
    )


def max_example_tokens(hyperparameters: Mapping[str, Any], limit: int) -> int:
    """Return the maximum length of an example: `max_length`, but at most `limit`. Raises `InvalidInput`."""
    return min(limit, _number(hyperparameters, "max_length") or limit)


def auto_batch_size(num_examples: int) -> int:
    """Return 1 to AUTO_BATCH_SIZE, so that an epoch has at least MIN_AUTO_BATCHES steps where possible."""
    return max(1, min(AUTO_BATCH_SIZE, num_examples // MIN_AUTO_BATCHES))


def auto_epochs(steps_per_epoch: int) -> int:
    """Return 1 to MAX_AUTO_EPOCHS, so that there are about AUTO_STEPS steps."""
    return max(1, min(MAX_AUTO_EPOCHS, round(AUTO_STEPS / steps_per_epoch)))


def _refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], param: str) -> None:
    for name in values:
        if name not in known:
            raise InvalidInput(
                f"unknown {param} {name!r}; known: {', '.join(known)}", param=f"{param}.{name}"
            )


def _number(values: Mapping[str, Any], name: str, param: str = "hyperparameters") -> Any:
    """Return the number at `name` in its type, None for "auto". Raises `InvalidInput`."""
    number_type, minimum, maximum, description = _NUMBERS[name]
    value = values.get(name, "auto")
    if value == "auto":
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum or value != number_type(value):
        message = f"{name} must be {description} or auto; got {value!r}"
        raise InvalidInput(message, param=f"{param}.{name}")
    return number_type(value)


def _learning_rate(hyperparameters: Mapping[str, Any], automatic: float) -> float:
    given: float | None = _number(hyperparameters, "learning_rate")
    multiplier = _number(hyperparameters, "learning_rate_multiplier")
    if given is None:
        return automatic * (multiplier or 1.0)
    if multiplier is not None:
        message = "the multiplier scales the automatic learning rate; give either it or learning_rate"
        raise InvalidInput(message, param="hyperparameters.learning_rate_multiplier")
    return given


def _schedule(hyperparameters: Mapping[str, Any]) -> str:
    value = hyperparameters.get("lr_scheduler_type", "auto")
    if value == "auto":
        return DEFAULT_SCHEDULE
    if value not in SCHEDULES:
        message = f"lr_scheduler_type must be auto or one of {', '.join(SCHEDULES)}; got {value!r}"
        raise InvalidInput(message, param="hyperparameters.lr_scheduler_type")
    return str(value)
