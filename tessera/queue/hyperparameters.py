"""The hyperparameters of a job: their names, and which of them exclude each other.

The service checks a request with this, and the worker checks a stored job. `trainer_worker/training/plan.py`
says what each one does and which values it may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tessera.errors import InvalidInput

#: The keys of `JobSpec.hyperparameters`.
HYPERPARAMETERS = (
    "n_epochs", "batch_size", "gradient_accumulation_steps", "learning_rate_multiplier", "learning_rate",
    "lr_scheduler_type", "min_lr_ratio", "warmup_ratio", "warmup_steps", "weight_decay", "optimizer",
    "momentum", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_length",
    "validation_split", "publish",
)  # fmt: skip

ADAMW, SGD = OPTIMIZERS = ("adamw", "sgd")
#: Which state of a run is published: the one with the lowest validation loss, or the last.
BEST, LAST = PUBLISHED_STATES = ("best", "last")

_EXCLUSIVE = (("learning_rate", "learning_rate_multiplier"), ("warmup_ratio", "warmup_steps"))
#: Hyperparameters that only one optimizer has.
_OWNERS: Mapping[str, str] = {
    "momentum": SGD,
    "adam_beta1": ADAMW,
    "adam_beta2": ADAMW,
    "adam_epsilon": ADAMW,
}


def given(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that are not "auto"."""
    return {name: value for name, value in hyperparameters.items() if value != "auto"}


def check_together(hyperparameters: Mapping[str, Any], *, has_validation_file: bool = False) -> None:
    """Raise `InvalidInput`, with the parameter, for values that exclude each other or would have no effect.

    hyperparameters: those in `HYPERPARAMETERS`, each a value of its own range, "auto" or absent.
    """
    chosen = given(hyperparameters)
    for first, second in _EXCLUSIVE:
        if first in chosen and second in chosen:
            raise _wrong(second, f"{first} and {second} exclude each other; give one of them")
    optimizer = chosen.get("optimizer", ADAMW)
    for name, owner in _OWNERS.items():
        if name in chosen and optimizer != owner:
            raise _wrong(name, f"{name} belongs to the optimizer {owner}; this job has {optimizer}")
    if optimizer == SGD and "learning_rate" not in chosen:
        message = "the automatic learning rate is AdamW's; give learning_rate with the optimizer sgd"
        raise _wrong("learning_rate", message)
    if "min_lr_ratio" in chosen and chosen.get("lr_scheduler_type") == "constant":
        raise _wrong("min_lr_ratio", "a constant learning rate does not fall; leave min_lr_ratio out")
    if has_validation_file and chosen.get("validation_split"):
        message = (
            "validation_file holds the examples for validation; leave validation_split out, or make it 0"
        )
        raise _wrong("validation_split", message)


def _wrong(name: str, message: str) -> InvalidInput:
    return InvalidInput(message, param=f"hyperparameters.{name}")
