"""What a job's hyper-parameters come to: batch size, epochs, learning rate, schedule, evaluations.

Knows the number of examples and what trains (`learning_rates.py`); neither model nor data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tessera.errors import InvalidInput
from tessera.queue.records import HYPERPARAMETERS

MAX_EPOCHS = 50
MAX_BATCH_SIZE = 256
#: Tokens; above every context there is.
MAX_LENGTH = 2**20
AUTO_BATCH_SIZE = 8
#: A small file is cut into at least this many batches.
MIN_AUTO_BATCHES = 8
#: Epochs are chosen to give about this many steps: in measurement (a) of `learning_rates.py` 60 steps gave
#: 4.271 and 4.269, 120 gave 4.267 and 4.238, 240 no more.
AUTO_STEPS = 90
#: With 50 examples the loss on others was lowest after 3 to 5 epochs.
MAX_AUTO_EPOCHS = 5

WARMUP_SHARE = 0.05
#: The default schedule ends at this part of the peak.
FINAL_SHARE = 0.1
DEFAULT_SCHEDULE = "cosine_with_min_lr"
MAX_GRAD_NORM = 1.0
NUM_EVALUATIONS = 8
PATIENCE = 2


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


#: By the names of transformers: the part of the peak that is left when the part `done` of all steps after the
#: warm-up is done.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    DEFAULT_SCHEDULE: lambda done: FINAL_SHARE + (1 - FINAL_SHARE) * _cosine(done),
    "cosine": _cosine,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


@dataclass(frozen=True)
class TrainingPlan:
    """All that decides a run, but for the data. evaluate_every: in steps; the first and last step as well.

    learning_rate: the peak. schedule: one of `SCHEDULES`.

    patience: evaluations without a fall by more than min_delta before the run ends early; None: never.
    """

    num_epochs: int
    batch_size: int
    total_steps: int
    learning_rate: float
    seed: int
    warmup_steps: int = 1
    evaluate_every: int = 1
    patience: int | None = PATIENCE
    min_delta: float = 0.0
    max_grad_norm: float = MAX_GRAD_NORM
    weight_decay: float = 0.0
    schedule: str = DEFAULT_SCHEDULE

    def learning_rate_at(self, step: int) -> float:
        """Of the 0-based `step`: a linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.learning_rate * SCHEDULES[self.schedule](min(1.0, done))


class Rated(Protocol):
    """What has an automatic learning rate: `BasisKind`, `LoraKind`."""

    def rate_for(self, num_examples: int) -> float: ...


def make_plan(
    hyperparameters: Mapping[str, Any],
    early_stopping: Mapping[str, Any] | None,
    *,
    num_examples: int,
    kind: Rated,
    seed: int,
) -> TrainingPlan:
    """The plan for `num_examples` to train on.

    hyperparameters: of those in `HYPERPARAMETERS`, each its value, "auto" or absent; max_length is about the
    data, and not looked at here. A learning_rate takes the place of the automatic one.
    early_stopping: {patience, min_delta}, both optional; None takes the defaults. Raises `InvalidInput`.
    """
    _refuse_unknown(hyperparameters, HYPERPARAMETERS, "hyperparameters")
    stopping = {"patience": PATIENCE, "min_delta": 0.0, **(early_stopping or {})}
    _refuse_unknown(stopping, ("patience", "min_delta"), "early_stopping")
    batch_size = _integer(hyperparameters, "batch_size", MAX_BATCH_SIZE) or auto_batch_size(num_examples)
    steps_per_epoch = math.ceil(num_examples / batch_size)
    num_epochs = _integer(hyperparameters, "n_epochs", MAX_EPOCHS) or auto_epochs(steps_per_epoch)
    total_steps = num_epochs * steps_per_epoch
    if stopping["patience"] is not None:
        _integer(stopping, "patience", 1000, "early_stopping")
    return TrainingPlan(
        num_epochs=num_epochs,
        batch_size=batch_size,
        total_steps=total_steps,
        learning_rate=_learning_rate(hyperparameters, kind.rate_for(num_examples)),
        seed=seed,
        warmup_steps=_warmup_steps(hyperparameters, total_steps),
        evaluate_every=max(1, math.ceil(total_steps / NUM_EVALUATIONS)),
        patience=stopping["patience"],
        min_delta=_non_negative(stopping["min_delta"], "early_stopping.min_delta"),
        weight_decay=_share(hyperparameters, "weight_decay") or 0.0,
        schedule=_schedule(hyperparameters),
    )


def max_example_tokens(hyperparameters: Mapping[str, Any], limit: int) -> int:
    """The longest that an example may be: `max_length`, but never above `limit`. Raises `InvalidInput`."""
    return min(limit, _integer(hyperparameters, "max_length", MAX_LENGTH) or limit)


def auto_batch_size(num_examples: int) -> int:
    """1 to AUTO_BATCH_SIZE, such that an epoch has MIN_AUTO_BATCHES steps if it can."""
    return max(1, min(AUTO_BATCH_SIZE, num_examples // MIN_AUTO_BATCHES))


def auto_epochs(steps_per_epoch: int) -> int:
    """1 to MAX_AUTO_EPOCHS, such that there are about AUTO_STEPS steps."""
    return max(1, min(MAX_AUTO_EPOCHS, round(AUTO_STEPS / steps_per_epoch)))


def _refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], param: str) -> None:
    for name in values:
        if name not in known:
            raise InvalidInput(
                f"unknown {param} {name!r}; known: {', '.join(known)}", param=f"{param}.{name}"
            )


def _integer(
    values: Mapping[str, Any], name: str, maximum: int, param: str = "hyperparameters"
) -> int | None:
    """The number at `name`, None for "auto". Raises `InvalidInput`."""
    value = values.get(name, "auto")
    if value == "auto":
        return None
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not is_whole or not 1 <= value <= maximum:
        message = f"{name} must be a whole number from 1 to {maximum} or auto; got {value!r}"
        raise InvalidInput(message, param=f"{param}.{name}")
    return int(value)


def _learning_rate(hyperparameters: Mapping[str, Any], automatic: float) -> float:
    given, multiplier = (
        _positive(hyperparameters, name) for name in ("learning_rate", "learning_rate_multiplier")
    )
    if given is None:
        return automatic * (1.0 if multiplier is None else multiplier)
    if multiplier is not None:
        message = "learning_rate says what the multiplier would be applied to; give one of them"
        raise InvalidInput(message, param="hyperparameters.learning_rate_multiplier")
    return given


def _warmup_steps(hyperparameters: Mapping[str, Any], total_steps: int) -> int:
    share = _share(hyperparameters, "warmup_ratio")
    return max(1, round(WARMUP_SHARE * total_steps)) if share is None else math.ceil(share * total_steps)


def _schedule(hyperparameters: Mapping[str, Any]) -> str:
    value = hyperparameters.get("lr_scheduler_type", "auto")
    if value == "auto":
        return DEFAULT_SCHEDULE
    if value not in SCHEDULES:
        message = f"lr_scheduler_type must be auto or one of {', '.join(SCHEDULES)}; got {value!r}"
        raise InvalidInput(message, param="hyperparameters.lr_scheduler_type")
    return str(value)


def _positive(hyperparameters: Mapping[str, Any], name: str) -> float | None:
    """The number at `name`, None for "auto". Raises `InvalidInput`."""
    value, param = hyperparameters.get(name, "auto"), f"hyperparameters.{name}"
    if value == "auto":
        return None
    if _non_negative(value, param) == 0:
        raise InvalidInput(f"{name} must be above 0", param=param)
    return float(value)


def _share(hyperparameters: Mapping[str, Any], name: str) -> float | None:
    """The number from 0 to 1 at `name`, None for "auto". Raises `InvalidInput`."""
    value, param = hyperparameters.get(name, "auto"), f"hyperparameters.{name}"
    if value == "auto":
        return None
    if _non_negative(value, param) > 1:
        raise InvalidInput(f"{name} must be a number from 0 to 1; got {value!r}", param=param)
    return float(value)


def _non_negative(value: Any, param: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InvalidInput(f"{param} must be a number of at least 0; got {value!r}", param=param)
    return float(value)
