"""What a job on preference pairs minimises: the options of DPO, their defaults and what they exclude.

The service checks a request with this, and the worker a stored job. The losses themselves are in
`trainer_worker/training/objectives/preference.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from tessera.errors import InvalidInput

#: The values of `JobSpec.objective`: the loss of the tokens to learn, or of pairs of answers.
SUPERVISED, DPO = OBJECTIVES = ("supervised", "dpo")
#: OpenAI's default and TRL's.
DEFAULT_BETA = 0.1
MAX_BETA = 1000.0
#: TRL's names of the losses.
LOSS_TYPES = ("sigmoid", "sigmoid_norm", "ipo", "hinge")
#: The losses that know label smoothing.
SMOOTHED = ("sigmoid", "sigmoid_norm")
_PARAM = "method.dpo.hyperparameters"


@dataclass(frozen=True)
class PreferenceOptions:
    """The options of DPO, by TRL's names."""

    #: How strongly the adapter is kept at its reference; of "ipo" the regularization τ.
    beta: float = DEFAULT_BETA
    #: One of `LOSS_TYPES`.
    loss_type: str = "sigmoid"
    #: The probability that a pair is the wrong way round, below 0.5.
    label_smoothing: float = 0.0
    #: Compare the log-probabilities themselves, not what they gained on the reference, which is not computed.
    reference_free: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Return the options with defaults for those that are "auto", null or absent.

        Raises `InvalidInput` with the dotted path in a request.
        """
        given = {name: value for name, value in options.items() if value is not None and value != "auto"}
        for name in given:
            if name not in OPTIONS:
                known = ", ".join(OPTIONS)
                raise InvalidInput(f"unknown option {name!r}; known: {known}", param=f"{_PARAM}.{name}")
        chosen = cls(**given)
        chosen._check()
        return chosen

    def _check(self) -> None:
        if not _is_number(self.beta) or not 0 < self.beta <= MAX_BETA:
            raise _wrong("beta", f"must be a number above 0 and at most {MAX_BETA:g}; got {self.beta!r}")
        if self.loss_type not in LOSS_TYPES:
            raise _wrong("loss_type", f"must be one of {', '.join(LOSS_TYPES)}; got {self.loss_type!r}")
        smoothing = self.label_smoothing
        if not _is_number(smoothing) or not 0 <= smoothing < 0.5:
            raise _wrong("label_smoothing", f"must be a number from 0 to below 0.5; got {smoothing!r}")
        if smoothing and self.loss_type not in SMOOTHED:
            message = f"belongs to the losses {' and '.join(SMOOTHED)}; this job has {self.loss_type}"
            raise _wrong("label_smoothing", message)
        if not isinstance(self.reference_free, bool):
            raise _wrong("reference_free", f"must be true or false; got {self.reference_free!r}")


#: The names of the options.
OPTIONS = tuple(field.name for field in fields(PreferenceOptions))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(name: str, problem: str) -> InvalidInput:
    return InvalidInput(f"{name} {problem}", param=f"{_PARAM}.{name}")
