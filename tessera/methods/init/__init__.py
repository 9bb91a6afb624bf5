"""Initializations: R_0 for every module of a basis, however the basis was built.

Each initialization is the projection of some first update of the weights onto the basis, so every one goes
with every basis; `presets.py` names the papers' combinations. R_0 is in *trained* coordinates, and
`basis.fold(R_0)` is what would be served. R_0 is never subtracted from W: training begins at W + B R_0 A.
(Subtracting it would be the same as training from zero, which is the initialization "zero".)
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
    """R_0 and how it was computed."""

    #: [M, r, r] float32, in trained coordinates.
    R0: Tensor
    #: The method, its options, and what it measured (such as the losses of a line search), as JSON.
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
    """Return R_0 [M, r, r] float32 by one of `INIT_METHODS`, in trained coordinates.

    base, calibration: the model and the user's labelled examples, if the method needs a gradient. step: what
    `build_basis_and_step` returned for a basis of the same data, which saves another pass over them. adapter:
    the one from which "warm" continues; adapter_basis: its basis, if that is another one. Raises
    `InvalidInput` or `BasisMismatch`.
    """
    request = InitInputs(basis, base, calibration, step, adapter, adapter_basis, progress)
    return compute_init(request, method=method, **options).R0


def compute_init(request: InitInputs, *, method: str = "zero", **options: Any) -> Initialization:
    """Compute R_0 as `make_init` does, and return it with notes: the chosen η, the losses tried, the data."""
    if method not in INIT_METHODS:
        raise InvalidInput(
            f"unknown initialization {method!r}; known: {', '.join(INIT_METHODS)}", param="init"
        )
    chosen = INIT_METHODS[method]
    filled = fill_options(f"initialization {method}", chosen.options, options)
    R0, notes = chosen.make(request, filled)
    R0 = R0.float()  # before the check, because a float64 value may not fit
    if not bool(torch.isfinite(R0).all()):
        bad = int((~torch.isfinite(R0)).flatten(1).any(1).nonzero()[0])
        name = request.basis.manifest.modules[bad].name
        raise InvalidInput(f"initialization {method} of {name} is not finite", param="init")
    return Initialization(R0.cpu().contiguous(), {"method": method, "options": filled, **notes})
