"""The parts of an initialization: a description, options, and a function that computes R_0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.options import Calibration, Option, Options, describe
from tessera.model.base_model import BaseModel


@dataclass(frozen=True)
class InitInputs:
    """Everything from which R_0 may be computed; see `make_init`."""

    basis: Basis
    base: BaseModel | None = None
    #: The user's labelled examples.
    calibration: CalibrationSet | None = None
    #: [M, r, r], a first step in trained coordinates that was computed with the basis.
    step: Tensor | None = None
    #: The adapter from which "warm" continues.
    adapter: Adapter | None = None
    #: The adapter's basis, if it is not `basis`.
    adapter_basis: Basis | None = None
    #: Called as progress(done, total) after each module.
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class InitMethod:
    """One way to initialize R."""

    name: str
    #: One line for users.
    description: str
    #: The paper, and which of its equations.
    paper: str
    #: (inputs, options) -> (R_0 [M, r, r] in trained coordinates, notes)
    make: Callable[[InitInputs, Options], tuple[Tensor, dict[str, Any]]]
    needs_calibration: Calibration = "none"
    #: Whether it continues from an adapter.
    needs_adapter: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what a caller may know about the method, as JSON."""
        described = describe(self.description, self.paper, self.needs_calibration, self.options)
        return {**described, "needs_adapter": self.needs_adapter}
