"""Initializations that are one step of full fine-tuning on the user's data, projected onto the basis.

    R_0 = η P_out^-1 (Bᵀ Δ Aᵀ) P_in^-1,   Bᵀ Δ Aᵀ = argmin_M ‖B M A - Δ‖_F

    sb_step    Δ = -sign(G), AdamW's first step                  LoRA-SB, arXiv 2411.19557, eqs 5-8
    da_step    Δ = -D g Z_λ^-1, the natural gradient             LoRA-DA, arXiv 2510.24561, eqs 16-21
    gradient   Δ = -g                                            LoRA-One, arXiv 2502.01235, algorithm 1

They need labelled examples and choose η by `step_size.py`. In a basis that was decomposed from the same Δ, Bᵀ
Δ Aᵀ is the paper's own initialization (diag(S_r) for LoRA-SB); in a shared basis it is the best one that the
basis allows, which the papers do not consider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tessera.errors import BasisMismatch, InvalidInput
from tessera.formats.basis import Basis
from tessera.methods.bases import lora_da
from tessera.methods.bases.lora_sb import MIN_LABEL_TOKENS, UPDATE_OPTIONS, add_noise, update_direction
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

#: Computes Δ [d_out, d_in] of one module.
Direction = Callable[[ModuleData, Options], Tensor]


def sb_direction(data: ModuleData, options: Options) -> Tensor:
    """Return -sign(G), or its smooth form, with the noise of the options."""
    update = update_direction(data.statistics.g(), soft_sign=options["soft_sign"])
    return add_noise(update, data.shape.name, options)


def da_direction(data: ModuleData, options: Options) -> Tensor:
    """Return -D g Z_λ^-1, divided by its largest singular value in the authors' mode."""
    delta = lora_da.module_step(data, options)[1]
    return delta / spectral_norm(delta) if lora_da.is_normalised(options) else delta


def gradient_direction(data: ModuleData, options: Options) -> Tensor:
    """Return -g of the mean loss; "spectral" divides it by its largest singular value, as in LoRA-One."""
    g = data.statistics.g() / data.statistics.counts.num_examples
    return -g / spectral_norm(g) if options["normalise"] == "spectral" else -g


def _step_init(
    direction: Direction, needs: Callable[[int, Options], Needs]
) -> Callable[[InitInputs, Options], tuple[Tensor, dict[str, Any]]]:
    """Return the function of an initialization that steps along `direction`, by the η of the options."""

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
    """Return Δ of all modules in trained coordinates, [M, r, r] float64; one pass over the data per group."""
    basis = request.basis
    targets = basis_targets(base, basis)
    module_needs = needs(basis.rank, options)
    cores: list[Tensor] = []
    reading = Reading(chosen, chosen, basis.rank, options["statistics_bytes"])
    for target, statistics in passes(base, targets, module_needs, reading):
        data = ModuleData(
            target.shape, target.weight, basis.rank, options["seed"], statistics, Decomposition("auto")
        )
        cores.append(project(direction(data, options), basis, len(cores)).cpu())
        if request.progress is not None:
            request.progress(len(cores), len(targets))
    return basis.unfold(torch.stack(cores))


def basis_targets(base: BaseModel, basis: Basis) -> list[Target]:
    """Return the modules of a basis in its model. Raises `BasisMismatch` if it belongs to another model."""
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
            f"a step of shape {list(step.shape)} does not fit basis {basis.basis_id}", param="step"
        )
    return step.double()


_STEP_OPTIONS = {
    **{name: DATA_OPTIONS[name] for name in ("seed", "statistics_bytes")},
    **ETA_OPTIONS,
    "num_examples": Option(
        0, "number of the user's examples, drawn at random; 0: min_label_tokens decides", minimum=0
    ),
    "min_label_tokens": Option(
        MIN_LABEL_TOKENS, "use as many examples as have this many tokens to learn", minimum=1
    ),
}
_DA_OPTIONS = {
    name: lora_da.METHOD.options[name]
    for name in ("mode", "form", "output_factor", "damping", "damping_mode", "normalise", "use_fisher")
}

SB_STEP = InitMethod(
    name="sb_step",
    description="AdamW's first step of full fine-tuning on the user's examples",
    paper="LoRA-SB, arXiv 2411.19557, eqs 5-8",
    make=_step_init(sb_direction, gradient_needs),
    needs_calibration="labelled",
    options={
        **_STEP_OPTIONS,
        **UPDATE_OPTIONS,
    },
)
DA_STEP = InitMethod(
    name="da_step",
    description="The natural-gradient step on the user's examples",
    paper="LoRA-DA, arXiv 2510.24561, eqs 16-21",
    make=_step_init(da_direction, lora_da.needs),
    needs_calibration="labelled",
    options={**_STEP_OPTIONS, **_DA_OPTIONS},
)
GRADIENT = InitMethod(
    name="gradient",
    description="A step against the gradient on the user's examples",
    paper="LoRA-One, arXiv 2502.01235, algorithm 1",
    make=_step_init(gradient_direction, gradient_needs),
    needs_calibration="labelled",
    options={
        **_STEP_OPTIONS,
        "normalise": Option(
            "none",
            "spectral: divide each module's step by its largest singular value",
            choices=("none", "spectral"),
        ),
    },
)
