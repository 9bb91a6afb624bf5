"""The parts of a method of building a basis: a description, options, and a function of one module.

A method sees one module at a time: its weight, and the statistics that the calibration passes collected. It
returns the paper's factors A' and B', with the paper's own scales; `formats/basis.py` makes the canonical
form of them.
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
    """Everything that a method knows about one module."""

    shape: ModuleShape
    #: [d_out, d_in]
    weight: Tensor
    rank: int
    #: Differs between modules, methods and ranks (`module_seed`).
    seed: int
    statistics: Statistics
    #: How to compute singular vectors, within the memory that is left.
    decomposition: Decomposition

    def generator(self) -> torch.Generator:
        """Return a generator on the CPU, so that its numbers do not depend on the device."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class ModuleFactors:
    """The frozen factors of one module. Training changes R' in delta_W = B' R' A'."""

    #: A' [r, d_in]
    A: Tensor
    #: B' [d_out, r]
    B: Tensor
    #: [r, r], the method's own first step in these coordinates, for a learning rate of one, if it has one.
    step: Tensor | None = None
    #: Finite numbers about this module for the recipe.
    notes: dict[str, float] = field(default_factory=dict)


class Refinement(Protocol):
    """Learning that follows once the factors of all modules are known, with the model and all data."""

    @property
    def num_steps(self) -> int:
        """Number of steps, for progress."""

    def refine(self, base: BaseModel, basis: Basis, *, dtype: str, progress: Callable[[int], None]) -> Basis:
        """Return the learned basis, stored as `dtype`. progress(steps done) may raise to end the learning."""


def no_needs(rank: int, options: Options) -> Needs:
    return Needs()


def no_check(rank: int, options: Options) -> None:
    return None


def stores_always(options: Options) -> bool:
    return True


def take_num_examples(calibration: CalibrationSet, options: Options) -> CalibrationSet:
    """Draw at most `num_examples` examples at random; 0: all."""
    return calibration.take(options["num_examples"] or len(calibration), seed=options["seed"])


#: Options of methods that need only weights. Under Adam the scale multiplies the learning rate (LoRAM,
#: proposition 1); it never reaches serving.
COMMON_OPTIONS: Mapping[str, Option] = {
    "svd": Option("auto", "how singular vectors are computed", choices=("auto", "exact", "randomised")),
    "scale": Option(1.0, "s in delta_W = s B' R' A', the papers' alpha / r", minimum=1e-12),
    "seed": Option(0, "seed of all random choices"),
}
#: Options of methods that read calibration data. The statistics of one layer of an 8B model take 0.9 GB for
#: gradients, and 1.9 GB with LoRA-DA's factors.
DATA_OPTIONS: Mapping[str, Option] = {
    **COMMON_OPTIONS,
    "num_examples": Option(0, "number of calibration examples to draw at random, at most; 0: all", minimum=0),
    "statistics_bytes": Option(
        0,
        "bytes of statistics in one pass over the data, but always one layer's; 0: as many as keep the peak "
        "below that of training a LoRA",
        minimum=0,
    ),
}


@dataclass(frozen=True)
class Method:
    """One published way to build a basis."""

    name: str
    #: One line for users.
    description: str
    #: The paper, and which of its equations.
    paper: str
    #: The method itself: the factors of one module.
    factorise: Callable[[ModuleData, Options], ModuleFactors]
    #: The least data that the default options need; `needs` says what given options need.
    needs_calibration: Calibration = "none"
    options: Mapping[str, Option] = field(default_factory=dict)
    #: The statistics that it needs for a rank and options.
    needs: Callable[[int, Options], Needs] = no_needs
    #: Raises `InvalidInput` for a rank or a combination of options that cannot work.
    check: Callable[[int, Options], None] = no_check
    #: The part of the data to use.
    select: Callable[[CalibrationSet, Options], CalibrationSet] = take_num_examples
    #: Makes the basis of the factors.
    assemble: Callable[..., Basis] = make_basis
    #: For a method whose modules are not independent: from all usable data, the rank and the options, the
    #: learning that follows. Raises `InvalidInput` if that cannot be done.
    refinement: Callable[[CalibrationSet | None, int, Options], Refinement] | None = None
    #: Whether its factors need room in a store, not only a manifest; takes the options as given.
    stores_factors: Callable[[Options], bool] = stores_always

    def describe(self) -> dict[str, Any]:
        """Return what a caller may know about the method, as JSON."""
        return describe(self.description, self.paper, self.needs_calibration, self.options)
