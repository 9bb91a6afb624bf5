"""What a start is: a description, options, and a function from a request to R_0."""

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
    """What there is to start from; see `make_init`."""

    basis: Basis
    base: BaseModel | None = None
    calibration: CalibrationSet | None = None
    step: Tensor | None = None
    adapter: Adapter | None = None
    adapter_basis: Basis | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class InitMethod:
    """One way to start. make: (request, options) -> R_0 [M, r, r] in trained coordinates, notes."""

    name: str
    description: str
    paper: str
    make: Callable[[InitInputs, Options], tuple[Tensor, dict[str, Any]]]
    needs_calibration: Calibration = "none"
    needs_adapter: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What a caller may know, as JSON."""
        described = describe(self.description, self.paper, self.needs_calibration, self.options)
        return {**described, "needs_adapter": self.needs_adapter}
