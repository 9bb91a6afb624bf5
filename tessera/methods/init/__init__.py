"""Where training begins: R_0 for every module of a basis, independent of how the basis was made.

Each start is the projection of some first update of the weights onto the basis, so any start goes with any
basis; `presets.py` names the papers' combinations. A start is in *trained* coordinates: `basis.fold(R_0)`
is what would be served. It is never subtracted from W: an adapter that starts at R_0 starts as W + B R_0 A.
(Subtracting it would be the same as training from zero, which is the start "zero".)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.init import first_steps, fixed
from tessera.methods.init.method import InitInputs, InitMethod
from tessera.methods.options import fill_options
from tessera.methods.presets import PRESETS, Preset
from tessera.model.base_model import BaseModel

__all__ = ["INIT_METHODS", "PRESETS", "InitMethod", "Initialization", "Preset", "compute_init", "make_init"]

INIT_METHODS: dict[str, InitMethod] = {
    method.name: method
    for method in (
        fixed.ZERO,
        fixed.NOISE,
        first_steps.SB_STEP,
        first_steps.DA_STEP,
        first_steps.GRADIENT,
        fixed.POPULATION,
        fixed.WARM,
    )
}


@dataclass(frozen=True)
class Initialization:
    """R0: [M, r, r] float32, in trained coordinates. notes: how it came about, as JSON."""

    R0: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


def make_init(
    basis: Basis,
    *,
    method: str = "zero",
    base: BaseModel | None = None,
    calibration: CalibrationSet | None = None,
    step: Tensor | None = None,
    adapter: Adapter | None = None,
    adapter_basis: Basis | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tensor:
    """R_0 [M, r, r] float32 by one of `INIT_METHODS`, in trained coordinates.

    base, calibration: the model and the user's labelled examples, for the starts that need a gradient.
    step: what `build_basis_and_step` returned for the basis of this very data, instead of another pass over
    it. adapter: to go on from, for "warm", with its own basis if it is another one. Raises `InvalidInput`,
    `BasisMismatch`.
    """
    request = InitInputs(basis, base, calibration, step, adapter, adapter_basis, progress)
    return compute_init(request, method=method, **options).R0


def compute_init(request: InitInputs, *, method: str = "zero", **options: Any) -> Initialization:
    """As `make_init`, with an account of it: the scale a line search chose, its losses, the data."""
    if method not in INIT_METHODS:
        raise InvalidInput(
            f"unknown initialization {method!r}; known: {', '.join(INIT_METHODS)}", param="init"
        )
    chosen = INIT_METHODS[method]
    filled = fill_options(f"initialization {method}", chosen.options, options)
    R0, notes = chosen.make(request, filled)
    R0 = R0.float()  # before it is looked at: what float64 holds may not fit
    if not bool(torch.isfinite(R0).all()):
        bad = int((~torch.isfinite(R0)).flatten(1).any(1).nonzero()[0])
        name = request.basis.manifest.modules[bad].name
        raise InvalidInput(f"initialization {method} of {name} is not finite", param="init")
    return Initialization(R0.cpu().contiguous(), {"method": method, "options": filled, **notes})
