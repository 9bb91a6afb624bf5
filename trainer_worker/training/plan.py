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
from tessera.queue.hyperparameters import (
    ADAMW,
    BEST,
    HYPERPARAMETERS,
    LAST,
    OPTIMIZERS,
    PUBLISHED_STATES,
    check_together,
)

MAX_EPOCHS = 50
MAX_BATCH_SIZE = 256
MAX_ACCUMULATION = 256
MAX_WARMUP_STEPS = 1_000_000
#: More would leave too little to train on.
MAX_VALIDATION_SPLIT = 0.9
#: Tokens; larger than the context of any model.
MAX_LENGTH = 2**20
MAX_PATIENCE = 1000
AUTO_BATCH_SIZE = 8
#: A small file is split into at least this many batches.
MIN_AUTO_BATCHES = 8
#: The number of epochs is chosen to give about this many steps. In measurement (a) of `learning_rates.py` the
#: loss was 4.271 and 4.269 after 60 steps, 4.267 and 4.238 after 120, and no better after 240.
AUTO_STEPS = 90
#: With an epoch of at most this many steps, fewer than 100 examples, there are about AUTO_STEPS_FEW.
#: SmolLM2, 60 tickets with five labels, right answers of 30 at the best of three rates: LoRA-XS 28 after 45
#: steps and 30 after 135; LoRA-SB 24 and 29. Where fewer steps are better, an early stop ends them.
FEW_STEPS_PER_EPOCH, AUTO_STEPS_FEW = 12, 135
MAX_AUTO_EPOCHS = 15

WARMUP_SHARE = 0.05
DEFAULT_SCHEDULE = "cosine_with_min_lr"
#: The default schedule ends at this fraction of the peak.
FINAL_SHARE = 0.1
MAX_GRAD_NORM = 1.0
#: torch's defaults. A β₂ of 0.95, 0.99 and 0.999 gave the same loss within 0.002 at every rate (120 steps).
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
NUM_EVALUATIONS = 8
PATIENCE = 2

_LEAST, _LARGEST, _BELOW_1 = math.ulp(0.0), sys.float_info.max, math.nextafter(1.0, 0.0)
#: By name of a number: its type, the least and the largest value, and both in words.
_NUMBERS: Mapping[str, tuple[type[int] | type[float], float, float, str]] = {
    "n_epochs": (int, 1, MAX_EPOCHS, f"a whole number from 1 to {MAX_EPOCHS}"),
    "batch_size": (int, 1, MAX_BATCH_SIZE, f"a whole number from 1 to {MAX_BATCH_SIZE}"),
    "gradient_accumulation_steps": (int, 1, MAX_ACCUMULATION, f"a whole number from 1 to {MAX_ACCUMULATION}"),
    "max_length": (int, 1, MAX_LENGTH, f"a whole number from 1 to {MAX_LENGTH}"),
    "patience": (int, 1, MAX_PATIENCE, f"a whole number from 1 to {MAX_PATIENCE}"),
    "learning_rate": (float, _LEAST, _LARGEST, "a number above 0"),
    "learning_rate_multiplier": (float, _LEAST, _LARGEST, "a number above 0"),
    "min_delta": (float, 0, _LARGEST, "a number of at least 0"),
    "min_lr_ratio": (float, 0, 1, "a number from 0 to 1"),
    "warmup_ratio": (float, 0, 1, "a number from 0 to 1"),
    "warmup_steps": (int, 0, MAX_WARMUP_STEPS, f"a whole number from 0 to {MAX_WARMUP_STEPS}"),
    "weight_decay": (float, 0, 1, "a number from 0 to 1"),
    "momentum": (float, 0, _BELOW_1, "a number from 0 to below 1"),
    "adam_beta1": (float, 0, _BELOW_1, "a number from 0 to below 1"),
    "adam_beta2": (float, 0, _BELOW_1, "a number from 0 to below 1"),
    "adam_epsilon": (float, _LEAST, 1, "a number above 0, up to 1"),
    "max_grad_norm": (float, 0, _LARGEST, "a number of at least 0"),
    "validation_split": (float, 0, MAX_VALIDATION_SPLIT, f"a number from 0 to {MAX_VALIDATION_SPLIT}"),
}


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


#: Functions, by their names in transformers, from the part of the steps after the warm-up that is done to
#: where the learning rate is between its end (0) and its peak (1).
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    DEFAULT_SCHEDULE: _cosine,
    "cosine": _cosine,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that determines a run except its data."""

    num_epochs: int
    #: Number of examples in a step of the optimizer: those of all accumulated batches.
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
    #: Batches in a step.
    gradient_accumulation_steps: int = 1
    #: None: gradients are not clipped.
    max_grad_norm: float | None = MAX_GRAD_NORM
    weight_decay: float = 0.0
    #: One of `SCHEDULES`.
    schedule: str = DEFAULT_SCHEDULE
    #: The automatic rate for this method and number of examples, of which learning_rate is a multiple; None
    #: if nobody knows it.
    automatic_rate: float | None = None
    #: The fraction of the peak at which the schedule ends.
    final_share: float = FINAL_SHARE
    #: One of `OPTIMIZERS`.
    optimizer: str = ADAMW
    #: Of SGD.
    momentum: float = 0.0
    #: Of AdamW.
    adam_beta1: float = ADAM_BETAS[0]
    adam_beta2: float = ADAM_BETAS[1]
    adam_epsilon: float = ADAM_EPSILON
    #: One of `PUBLISHED_STATES`.
    publish: str = BEST

    def learning_rate_at(self, step: int) -> float:
        """Return the rate of the 0-based `step`: a linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        height = SCHEDULES[self.schedule](min(1.0, done))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * height)


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
    automatic one; max_length and validation_split concern the data and are ignored here.
    early_stopping: {patience, min_delta}, both optional; None takes the defaults, which are to end early only
    if the best state is published. Raises `InvalidInput`.
    """
    _refuse_unknown(hyperparameters, HYPERPARAMETERS, "hyperparameters")
    check_together(hyperparameters)
    publish = _choice(hyperparameters, "publish", PUBLISHED_STATES) or BEST
    if early_stopping is None and publish == LAST:
        early_stopping = {"patience": None}
    stopping = {"patience": PATIENCE, "min_delta": 0.0, **(early_stopping or {})}
    _refuse_unknown(stopping, ("patience", "min_delta"), "early_stopping")
    batch_size: int = _number(hyperparameters, "batch_size") or auto_batch_size(num_examples)
    accumulation: int = _number(hyperparameters, "gradient_accumulation_steps") or 1
    batch_size *= accumulation
    steps_per_epoch = math.ceil(num_examples / batch_size)
    num_epochs = _number(hyperparameters, "n_epochs") or auto_epochs(steps_per_epoch)
    total_steps = num_epochs * steps_per_epoch
    automatic_rate = kind.rate_for(num_examples)
    patience = stopping["patience"]
    if patience is not None:
        patience = _number(stopping, "patience", "early_stopping") or PATIENCE
    return TrainingPlan(
        num_epochs=num_epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        total_steps=total_steps,
        learning_rate=_learning_rate(hyperparameters, automatic_rate),
        seed=seed,
        warmup_steps=_warmup_steps(hyperparameters, total_steps),
        evaluate_every=max(1, math.ceil(total_steps / NUM_EVALUATIONS)),
        patience=patience,
        min_delta=_number(stopping, "min_delta", "early_stopping") or 0.0,
        automatic_rate=automatic_rate,
        publish=publish,
        **_schedule(hyperparameters),
        **_optimizer(hyperparameters),
    )


def max_example_tokens(hyperparameters: Mapping[str, Any], limit: int) -> int:
    """Return the maximum length of an example: `max_length`, but at most `limit`. Raises `InvalidInput`."""
    return min(limit, _number(hyperparameters, "max_length") or limit)


def validation_share(hyperparameters: Mapping[str, Any]) -> float | None:
    """Return the share of the examples to hold back for validation; None: decide by their number.

    Raises `InvalidInput`.
    """
    share: float | None = _number(hyperparameters, "validation_split")
    return share


def has_automatic_rate(hyperparameters: Mapping[str, Any]) -> bool:
    """Return whether the learning rate is left to the trainer."""
    names = ("learning_rate", "learning_rate_multiplier")
    return all(hyperparameters.get(name, "auto") == "auto" for name in names)


def auto_batch_size(num_examples: int) -> int:
    """Return 1 to AUTO_BATCH_SIZE, so that an epoch has at least MIN_AUTO_BATCHES steps where possible."""
    return max(1, min(AUTO_BATCH_SIZE, num_examples // MIN_AUTO_BATCHES))


def auto_epochs(steps_per_epoch: int) -> int:
    """Return 1 to MAX_AUTO_EPOCHS, so that there are about as many steps as wanted."""
    wanted = AUTO_STEPS_FEW if steps_per_epoch <= FEW_STEPS_PER_EPOCH else AUTO_STEPS
    return max(1, min(MAX_AUTO_EPOCHS, round(wanted / steps_per_epoch)))


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
    multiplier: float = _number(hyperparameters, "learning_rate_multiplier") or 1.0
    return automatic * multiplier if given is None else given


def _warmup_steps(hyperparameters: Mapping[str, Any], total_steps: int) -> int:
    steps: int | None = _number(hyperparameters, "warmup_steps")
    if steps is not None:
        return min(steps, total_steps)
    share: float | None = _number(hyperparameters, "warmup_ratio")
    if share is None:
        return max(1, round(WARMUP_SHARE * total_steps))
    return math.ceil(share * total_steps)


def _schedule(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan's fields for the schedule."""
    schedule = _choice(hyperparameters, "lr_scheduler_type", tuple(SCHEDULES)) or DEFAULT_SCHEDULE
    final_share = _number(hyperparameters, "min_lr_ratio")
    if final_share is None:
        final_share = FINAL_SHARE if schedule == DEFAULT_SCHEDULE else 0.0
    return {"schedule": schedule, "final_share": final_share}


def _optimizer(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan's fields for the optimizer."""
    fields: dict[str, Any] = {"optimizer": _choice(hyperparameters, "optimizer", OPTIMIZERS) or ADAMW}
    for name in ("weight_decay", "momentum", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"):
        value = _number(hyperparameters, name)
        if value is not None:
            fields[name] = value
    if fields.get("max_grad_norm") == 0:
        fields["max_grad_norm"] = None
    return fields


def _choice(hyperparameters: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str | None:
    """Return the word at `name`, None for "auto". Raises `InvalidInput`."""
    value = hyperparameters.get(name, "auto")
    if value == "auto":
        return None
    if value not in known:
        message = f"{name} must be auto or one of {', '.join(known)}; got {value!r}"
        raise InvalidInput(message, param=f"hyperparameters.{name}")
    return str(value)
