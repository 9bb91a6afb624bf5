"""What every method of building a basis is: a description, checked options, and a function of one module.

A method sees one module at a time: its weight and what the calibration passes collected for it. It returns
the factors A' and B' of the paper, with the paper's own scales; the canonical form is made of them
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.collected import Needs, Statistics
from tessera.methods.building.decomposition import Decomposition
from tessera.methods.options import Calibration, Option, Options, describe
from tessera.model.base_model import BaseModel


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
