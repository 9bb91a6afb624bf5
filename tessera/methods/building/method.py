"""What every method of building a basis is: a description, checked options, and a function of one module.

A method sees one module at a time: its weight and what the calibration passes collected for it. It returns
the factors A' and B' of the paper, with the paper's own scales; the canonical form is made of them
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.collected import Needs, Statistics
from tessera.methods.building.decomposition import Decomposition
from tessera.model.base_model import BaseModel

Calibration = Literal["none", "text", "labelled"]
#: All options of a method by name, defaults filled in and checked.
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Option:
    """One option. A default of None means that another option decides it; `kind` then says what may be given.

    choices: of a string. minimum, maximum: of a number, inclusive.
    """

    default: bool | int | float | str | None
    description: str
    kind: type | None = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def value_type(self) -> type:
        return self.kind or type(self.default)

    def check(self, name: str, value: Any) -> Any:
        """The value, as the option's type. Raises `InvalidInput` naming the option and what it may be."""
        if value is None and self.default is None:
            return None
        wanted = self.value_type
        if wanted is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not wanted:
            raise InvalidInput(f"{name} must be a {wanted.__name__}, got {value!r}", param=name)
        if self.choices and value not in self.choices:
            raise InvalidInput(f"{name} must be {', '.join(self.choices)}; got {value!r}", param=name)
        if isinstance(value, int | float):
            self._check_number(name, value)
        return value

    def describe(self) -> dict[str, Any]:
        """The option as JSON; what does not apply is left out."""
        limits = {"choices": list(self.choices) or None, "minimum": self.minimum, "maximum": self.maximum}
        described = {
            "type": self.value_type.__name__,
            "default": self.default,
            "description": self.description,
        }
        return {**described, **{name: limit for name, limit in limits.items() if limit is not None}}

    def _check_number(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise InvalidInput(f"{name} must be finite, got {value}", param=name)
        if self.minimum is not None and value < self.minimum:
            raise InvalidInput(f"{name} must be at least {self.minimum:g}, got {value:g}", param=name)
        if self.maximum is not None and value > self.maximum:
            raise InvalidInput(f"{name} must be at most {self.maximum:g}, got {value:g}", param=name)


def fill_options(owner: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults and the given values, checked. Raises `InvalidInput`; an unknown name gets the known."""
    for name in given:
        if name not in known:
            hint = ", ".join(sorted(known)) or "none"
            raise InvalidInput(f"{owner} has no option {name!r}; its options: {hint}", param=name)
    return {name: option.check(name, given.get(name, option.default)) for name, option in known.items()}


@dataclass(frozen=True)
class ModuleData:
    """What a method knows of one module. weight: [d_out, d_in]; seed: of this module's build."""

    shape: ModuleShape
    weight: Tensor
    rank: int
    seed: int
    statistics: Statistics
    decomposition: Decomposition

    def generator(self) -> torch.Generator:
        """On the CPU, so that the numbers do not depend on the device."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class ModuleFactors:
    """A': [r, d_in] and B': [d_out, r], frozen; what is trained is R' in delta_W = B' R' A'.

    step: [r, r], the method's own first step in these coordinates, for a learning rate of one, if it has one.
    notes: finite numbers about this module that belong in the recipe.
    """

    A: Tensor
    B: Tensor
    step: Tensor | None = None
    notes: dict[str, float] = field(default_factory=dict)


class Refinement(Protocol):
    """What a method learns once the factors of all modules are known, with the model and all data at hand."""

    @property
    def num_steps(self) -> int:
        """For the account of progress."""

    def refine(self, base: BaseModel, basis: Basis, *, dtype: str, progress: Callable[[int], None]) -> Basis:
        """The basis to use instead, stored as `dtype`. progress(steps done) may raise to end it."""


def no_needs(rank: int, options: Options) -> Needs:
    return Needs()


def no_check(rank: int, options: Options) -> None:
    return None


def stores_always(options: Options) -> bool:
    return True


def take_num_examples(calibration: CalibrationSet, options: Options) -> CalibrationSet:
    """At most `num_examples` of the examples, at random; 0 is all."""
    return calibration.take(options["num_examples"] or len(calibration), seed=options["seed"])


#: Of methods that need nothing but weights. The scale multiplies the learning rate under Adam (LoRAM,
#: proposition 1) and never reaches serving.
COMMON_OPTIONS: Mapping[str, Option] = {
    "svd": Option("auto", "how singular vectors are found", choices=("auto", "exact", "randomised")),
    "scale": Option(1.0, "s in delta_W = s B' R' A', as the papers' alpha / r", minimum=1e-12),
    "seed": Option(0, "of everything random in it"),
}
#: Of methods that read calibration data. One layer of an 8B model needs 0.9 GB of statistics for its
#: gradients and 1.9 GB with LoRA-DA's factors; one layer is always taken.
DATA_OPTIONS: Mapping[str, Option] = {
    **COMMON_OPTIONS,
    "num_examples": Option(0, "at most so many of the calibration examples, at random; 0 is all", minimum=0),
    "statistics_bytes": Option(
        0,
        "memory for statistics in one pass over the data, of one layer at least; 0: below the peak of "
        "training LoRA",
        minimum=0,
    ),
}


@dataclass(frozen=True)
class Method:
    """One published way to build a basis.

    needs_calibration: the least that its default options need (`needs` knows what given options need).
    factorise: the method itself. check: raises `InvalidInput` for a rank or a combination of options that
    cannot work. select: the part of the data to use, where that is not just `num_examples`. assemble: from
    factors to basis. refinement: from all usable data, the rank and the options to what is learned on top of
    that, for a method whose modules are not independent; it raises for what it cannot do. stores_factors:
    from options as given to whether its factors need room in a store, not only a manifest.
    """

    name: str
    description: str
    paper: str
    factorise: Callable[[ModuleData, Options], ModuleFactors]
    needs_calibration: Calibration = "none"
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: Callable[[int, Options], Needs] = no_needs
    check: Callable[[int, Options], None] = no_check
    select: Callable[[CalibrationSet, Options], CalibrationSet] = take_num_examples
    assemble: Callable[..., Basis] = make_basis
    refinement: Callable[[CalibrationSet | None, int, Options], Refinement] | None = None
    stores_factors: Callable[[Options], bool] = stores_always

    def describe(self) -> dict[str, Any]:
        """What a caller may know, as JSON."""
        return describe(self.description, self.paper, self.needs_calibration, self.options)


def describe(
    description: str, paper: str, needs_calibration: Calibration, options: Mapping[str, Option]
) -> dict[str, Any]:
    """A method or a start as JSON."""
    return {
        "description": description,
        "paper": paper,
        "needs_calibration": needs_calibration,
        "options": {name: option.describe() for name, option in options.items()},
    }
