"""What a job's hyper-parameters come to: batch size, epochs, learning rate, schedule, evaluations.

Knows the number of examples and what trains (`learning_rates.py`); neither model nor data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from adapter_core.errors import InvalidInput
from trainer_worker.learning_rates import BasisKind, LoraKind

__all__ = ["BasisKind", "LoraKind", "TrainingPlan", "make_plan"]

MAX_EPOCHS = 50
MAX_BATCH_SIZE = 256
AUTO_BATCH_SIZE = 8
#: A small file is cut into at least this many batches.
MIN_AUTO_BATCHES = 8
#: Epochs are chosen to give about this many steps: in measurement (a) of `learning_rates.py` 60 steps gave
#: 4.271 and 4.269, 120 gave 4.267 and 4.238, 240 no more.
AUTO_STEPS = 90
#: With 50 examples the loss on others was lowest after 3 to 5 epochs.
MAX_AUTO_EPOCHS = 5

WARMUP_SHARE = 0.05
#: The schedule ends at this part of the peak.
FINAL_SHARE = 0.1
MAX_GRAD_NORM = 1.0
NUM_EVALUATIONS = 8
PATIENCE = 2


@dataclass(frozen=True)
class TrainingPlan:
    """All that decides a run, but for the data. evaluate_every: in steps; the first and last step as well.

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

    def learning_rate_at(self, step: int) -> float:
        """Of the 0-based `step`: a linear warm-up, then a cosine down to FINAL_SHARE of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


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

    hyperparameters: n_epochs, batch_size, learning_rate_multiplier, each a number, "auto" or absent.
    early_stopping: {patience, min_delta}, both optional; None takes the defaults. Raises `InvalidInput`.
    """
    _refuse_unknown(
        hyperparameters, ("n_epochs", "batch_size", "learning_rate_multiplier"), "hyperparameters"
    )
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
        learning_rate=kind.rate_for(num_examples) * _multiplier(hyperparameters),
        seed=seed,
        warmup_steps=max(1, round(WARMUP_SHARE * total_steps)),
        evaluate_every=max(1, math.ceil(total_steps / NUM_EVALUATIONS)),
        patience=stopping["patience"],
        min_delta=_non_negative(stopping["min_delta"], "early_stopping.min_delta"),
    )


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


def _multiplier(hyperparameters: Mapping[str, Any]) -> float:
    value = hyperparameters.get("learning_rate_multiplier", "auto")
    if value == "auto":
        return 1.0
    name = "hyperparameters.learning_rate_multiplier"
    if _non_negative(value, name) == 0:
        raise InvalidInput("learning_rate_multiplier must be above 0", param=name)
    return float(value)


def _non_negative(value: Any, param: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InvalidInput(f"{param} must be a number of at least 0; got {value!r}", param=param)
    return float(value)
