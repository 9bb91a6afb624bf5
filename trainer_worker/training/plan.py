"""From a job's hyperparameters to its plan: batch size, epochs, learning rate, schedule, evaluations.

Knows the number of examples and what is trained (`learning_rates.py`), but neither model nor data.
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
#: In tokens; larger than the context of any model.
MAX_LENGTH = 2**20
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


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


#: By their names in transformers, functions from the fraction of the steps after the warm-up that are done to
#: the fraction of the peak learning rate.
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
    #: In examples.
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
    #: In nats per token.
    min_delta: float = 0.0
    max_grad_norm: float = MAX_GRAD_NORM
    weight_decay: float = 0.0
    #: One of `SCHEDULES`.
    schedule: str = DEFAULT_SCHEDULE

    def learning_rate_at(self, step: int) -> float:
        """The rate of the 0-based `step`: a linear warm-up, then the schedule."""
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
    """The plan for `num_examples` training examples.

    hyperparameters: those in `HYPERPARAMETERS`, each a value, "auto" or absent. A learning_rate replaces the
    automatic one; max_length concerns the data and is ignored here.
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
    """The maximum length of an example: `max_length`, but at most `limit`. Raises `InvalidInput`."""
    return min(limit, _integer(hyperparameters, "max_length", MAX_LENGTH) or limit)


def auto_batch_size(num_examples: int) -> int:
    """1 to AUTO_BATCH_SIZE, so that an epoch has at least MIN_AUTO_BATCHES steps where possible."""
    return max(1, min(AUTO_BATCH_SIZE, num_examples // MIN_AUTO_BATCHES))


def auto_epochs(steps_per_epoch: int) -> int:
    """1 to MAX_AUTO_EPOCHS, so that there are about AUTO_STEPS steps."""
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
        message = "the multiplier scales the automatic learning rate; give either it or learning_rate"
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
