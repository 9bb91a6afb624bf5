"""Options of methods and initializations: their types, limits, defaults and descriptions. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tessera.errors import InvalidInput

Calibration = Literal["none", "text", "labelled"]
#: All options of a method by name, defaults filled in and checked.
Options = Mapping[str, Any]

_TYPES: dict[str, type] = {kind.__name__: kind for kind in (bool, int, float, str)}


@dataclass(frozen=True)
class Option:
    """One option of a method or an initialization."""

    #: None: another option decides.
    default: bool | int | float | str | None
    #: One line for users.
    description: str
    #: The type of its values; needed if the default is None.
    kind: type | None = None
    #: The allowed values of a string; empty: any.
    choices: tuple[str, ...] = ()
    #: Inclusive limits of a number.
    minimum: float | None = None
    maximum: float | None = None

    @property
    def value_type(self) -> type:
        return self.kind or type(self.default)

    def check(self, name: str, value: Any) -> Any:
        """Return the value in the option's type. Raises `InvalidInput`, which says what is allowed."""
        if value is None and self.default is None:
            return None
        expected = self.value_type
        if expected is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not expected:
            raise InvalidInput(f"{name} must be a {expected.__name__}, got {value!r}", param=name)
        if self.choices and value not in self.choices:
            raise InvalidInput(f"{name} must be {', '.join(self.choices)}; got {value!r}", param=name)
        if isinstance(value, int | float):
            self._check_number(name, value)
        return value

    def describe(self) -> dict[str, Any]:
        """Return the option as JSON, without limits that it does not have."""
        limits = {"choices": list(self.choices) or None, "minimum": self.minimum, "maximum": self.maximum}
        described = {
            "type": self.value_type.__name__,
            "default": self.default,
            "description": self.description,
        }
        return {**described, **{name: limit for name, limit in limits.items() if limit is not None}}

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> Option:
        """Return the option from what `describe` returned."""
        return cls(
            described["default"],
            described["description"],
            _TYPES[described["type"]],
            tuple(described.get("choices", ())),
            described.get("minimum"),
            described.get("maximum"),
        )

    def _check_number(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise InvalidInput(f"{name} must be finite, got {value}", param=name)
        if self.minimum is not None and value < self.minimum:
            raise InvalidInput(f"{name} must be at least {self.minimum:g}, got {value:g}", param=name)
        if self.maximum is not None and value > self.maximum:
            raise InvalidInput(f"{name} must be at most {self.maximum:g}, got {value:g}", param=name)


def fill_options(owner: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all known options, with checked values and defaults.

    owner: the method's name, for messages. Raises `InvalidInput`; for an unknown name it lists the known
    ones.
    """
    for name in given:
        if name not in known:
            hint = ", ".join(sorted(known)) or "none"
            raise InvalidInput(f"{owner} has no option {name!r}; its options: {hint}", param=name)
    return {name: option.check(name, given.get(name, option.default)) for name, option in known.items()}


def describe(
    description: str, paper: str, needs_calibration: Calibration, options: Mapping[str, Option]
) -> dict[str, Any]:
    """Return a method or an initialization as JSON."""
    return {
        "description": description,
        "paper": paper,
        "needs_calibration": needs_calibration,
        "options": {name: option.describe() for name, option in options.items()},
    }
