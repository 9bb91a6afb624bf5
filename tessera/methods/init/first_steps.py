"""Starts that are one step of full fine-tuning on the user's data, projected onto the basis.

    R_0 = η P_out^-1 (Bᵀ Δ Aᵀ) P_in^-1,   Bᵀ Δ Aᵀ = argmin_M ‖B M A - Δ‖_F

and Δ = -sign(G) (LoRA-SB), the natural-gradient step (LoRA-DA) or -g. In the basis that the same Δ was
decomposed for, Bᵀ Δ Aᵀ is the method's own start (diag(S_r) for LoRA-SB); in a shared basis it is the best
that basis allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tessera.errors import BasisMismatch, InvalidInput
from tessera.formats.basis import Basis
from tessera.methods.bases import lora_da
from tessera.methods.bases.lora_sb import MIN_LABEL_TOKENS, update_direction
from tessera.methods.building.build import Reading, check_size, passes, usable_calibration
from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.collected import Needs
from tessera.methods.building.decomposition import Decomposition, spectral_norm
from tessera.methods.building.gradient_space import gradient_needs
from tessera.methods.building.method import DATA_OPTIONS, ModuleData
from tessera.methods.building.rebasing import project
from tessera.methods.building.targets import Target
from tessera.methods.checks import fixed_eta
from tessera.methods.init.method import InitInputs, InitMethod
from tessera.methods.init.step_size import ETA_OPTIONS, choose_eta
from tessera.methods.options import Option, Options
from tessera.model.base_model import BaseModel

#: Δ [d_out, d_in] of one module.
Direction = Callable[[ModuleData, Options], Tensor]


def sb_direction(data: ModuleData, options: Options) -> Tensor:
    """-sign(G), or its smooth form."""
    return update_direction(data.statistics.g(), soft_sign=options["soft_sign"])


def da_direction(data: ModuleData, options: Options) -> Tensor:
    """-D g Z_λ^-1; in the authors' mode divided by its largest singular value."""
    delta = lora_da.module_step(data, options)[1]
    return delta / spectral_norm(delta) if lora_da.is_normalised(options) else delta


def gradient_direction(data: ModuleData, options: Options) -> Tensor:
    """-g of the mean loss; spectral: divided by its largest singular value, as LoRA-One."""
    g = data.statistics.g() / data.statistics.counts.num_examples
    return -g / spectral_norm(g) if options["normalise"] == "spectral" else -g


def _step_init(
    direction: Direction, needs: Callable[[int, Options], Needs]
) -> Callable[[InitInputs, Options], tuple[Tensor, dict[str, Any]]]:
    """The start that takes this direction, scaled by the options' step size."""

    def make(request: InitInputs, options: Options) -> tuple[Tensor, dict[str, Any]]:
        eta = fixed_eta(options)  # before any pass, so that a missing option costs nothing
        if request.step is not None and eta is not None:
            return eta * _given_step(request), {"eta": eta}
        base, chosen = _data(request, needs(request.basis.rank, options), options)
        if request.step is not None:
            step = _given_step(request)
        else:
            step = projected_step(request, base, chosen, direction, needs, options)
        notes: dict[str, Any] = {"num_examples": len(chosen), "num_label_tokens": chosen.num_label_tokens}
        if eta is None:
            eta, losses = choose_eta(base, request.basis, step, chosen, options)
            notes["losses"] = losses
        return eta * step, {**notes, "eta": eta}

    return make


@torch.no_grad()
def projected_step(
    request: InitInputs,
    base: BaseModel,
    chosen: CalibrationSet,
    direction: Direction,
    needs: Callable[[int, Options], Needs],
    options: Options,
) -> Tensor:
    """Δ of every module in trained coordinates, [M, r, r] float64. One pass over the data per layer group."""
    basis = request.basis
    targets = basis_targets(base, basis)
    wanted = needs(basis.rank, options)
    cores: list[Tensor] = []
    reading = Reading(chosen, chosen, basis.rank, options["statistics_bytes"])
    for target, statistics in passes(base, targets, wanted, reading):
        data = ModuleData(
            target.shape, target.weight, basis.rank, options["seed"], statistics, Decomposition("auto")
        )
        cores.append(project(direction(data, options), basis, len(cores)).cpu())
        if request.progress is not None:
            request.progress(len(cores), len(targets))
    return basis.unfold(torch.stack(cores))


def basis_targets(base: BaseModel, basis: Basis) -> list[Target]:
    """The modules of a basis in its model. Raises `BasisMismatch` if it is another model's."""
    if basis.manifest.model_id != base.model_id:
        raise BasisMismatch(f"basis {basis.basis_id} belongs to model {basis.manifest.model_id}")
    targets = []
    for shape in basis.manifest.modules:
        linear = base.model.get_submodule(shape.name)
        assert isinstance(linear, nn.Linear)
        targets.append(Target(shape, linear))
    return targets


def _data(request: InitInputs, needs: Needs, options: Options) -> tuple[BaseModel, CalibrationSet]:
    if request.base is None:
        raise InvalidInput("this initialization needs the base model", param="init")
    usable = usable_calibration(request.base, "this initialization", needs, request.calibration)
    assert usable is not None
    if options["num_examples"]:
        chosen = usable.take(options["num_examples"], seed=options["seed"])
    else:
        chosen = usable.take(1, seed=options["seed"], min_label_tokens=options["min_label_tokens"])
    check_size(chosen, 1)
    return request.base, chosen


def _given_step(request: InitInputs) -> Tensor:
    step, basis = request.step, request.basis
    assert step is not None
    if step.shape != (basis.num_modules, basis.rank, basis.rank):
        raise InvalidInput(
            f"a step of shape {list(step.shape)} is not of basis {basis.basis_id}", param="step"
        )
    return step.double()


_STEP_OPTIONS = {
    **{name: DATA_OPTIONS[name] for name in ("seed", "statistics_bytes")},
    **ETA_OPTIONS,
    "num_examples": Option(0, "so many of the user's examples, at random; 0: by min_label_tokens", minimum=0),
    "min_label_tokens": Option(
        MIN_LABEL_TOKENS, "as many examples as have so many tokens to learn", minimum=1
    ),
}
_DA_OPTIONS = {
    name: lora_da.METHOD.options[name]
    for name in ("mode", "form", "damping", "damping_mode", "normalise", "use_fisher")
}

SB_STEP = InitMethod(
    name="sb_step",
    description="AdamW's first step of full fine-tuning on the user's examples",
    paper="LoRA-SB, arXiv 2411.19557, eqs 5-8",
    make=_step_init(sb_direction, gradient_needs),
    needs_calibration="labelled",
    options={
        **_STEP_OPTIONS,
        "soft_sign": Option(0.0, "ε of g / (|g| + ε); 0 is the paper's sign", minimum=0.0),
    },
)
DA_STEP = InitMethod(
    name="da_step",
    description="the natural-gradient step on the user's examples",
    paper="LoRA-DA, eqs 16-21",
    make=_step_init(da_direction, lora_da.needs),
    needs_calibration="labelled",
    options={**_STEP_OPTIONS, **_DA_OPTIONS},
)
GRADIENT = InitMethod(
    name="gradient",
    description="a step against the gradient on the user's examples",
    paper="LoRA-One, arXiv 2502.01235, algorithm 1",
    make=_step_init(gradient_direction, gradient_needs),
    needs_calibration="labelled",
    options={
        **_STEP_OPTIONS,
        "normalise": Option(
            "none", "spectral: divide by σ_max, module by module", choices=("none", "spectral")
        ),
    },
)
