"""The length η of the first step.

LoRA-SB calls η the learning rate (eq. 5), while its authors' code uses lr / (warm-up ratio · steps), the rate
of the first warm-up step. The drop of the first loss is linear in η: invisible at the code's 3e-7, large near
1e-3, and a rise above that (a small model at r = 8: .0003 / .0302 / .204 / -.045 at 1e-6 / 1e-4 / 1e-3 /
3e-3). So η is explicit here, and the default is a line search of a few forward passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.formats.basis import Basis
from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.losses import attached, mean_loss
from tessera.methods.options import Option, Options
from tessera.model.base_model import BaseModel

#: The search begins at the η that changes the median module by this share of its weight's norm, and
#: multiplies or divides by this factor.
FIRST_RELATIVE_CHANGE = 0.01
FACTOR = 4.0
#: Maximal number of forward passes, including the one without an adapter, before one or two near a fitted
#: optimum.
MAX_PASSES = 7

ETA_OPTIONS = {
    "eta_init": Option(
        "line_search",
        "how η is chosen: by line search, by eta, or as the rate of training or of its first warm-up step",
        choices=("line_search", "value", "lr", "first_warmup_step"),
    ),
    "eta": Option(None, "η for eta_init=value", float, minimum=0.0),
    "learning_rate": Option(
        None, "learning rate of the training, for eta_init=lr and first_warmup_step", float, minimum=0.0
    ),
    "warmup_ratio": Option(
        0.02, "share of warm-up steps, for eta_init=first_warmup_step", minimum=1e-9, maximum=1.0
    ),
    "total_steps": Option(
        None, "optimisation steps of the training, for eta_init=first_warmup_step", int, minimum=1
    ),
    "search_examples": Option(64, "number of examples that the line search uses", minimum=1),
}


def choose_eta(
    base: BaseModel, basis: Basis, step: Tensor, calibration: CalibrationSet, options: Options
) -> tuple[float, dict[str, float]]:
    """Return the best η found for the loss of the calibration examples, and the loss at each η (as a string).

    η is 0 if no step improves the loss, so an initialization never harms it. step: [M, r, r] in trained
    coordinates, for η = 1.
    """
    examples = calibration.take(options["search_examples"], seed=options["seed"])
    core = basis.fold(step)
    losses: dict[float, float] = {0.0: mean_loss(base, examples)}

    def loss_at(eta: float) -> float:
        with attached(base, basis, eta * core):
            try:
                losses[eta] = mean_loss(base, examples)
            except InvalidInput:  # the step is far too long and the loss overflows
                losses[eta] = float("inf")
        return losses[eta]

    eta = first_eta(base, basis, core)
    direction = FACTOR if loss_at(eta) < losses[0.0] else 1 / FACTOR
    while len(losses) < MAX_PASSES:
        previous, eta = eta, eta * direction
        improved = loss_at(eta) < losses[previous]
        if (direction > 1 and not improved) or (direction < 1 and losses[eta] < losses[0.0]):
            break
    fitted = parabola_minimum(losses)
    if fitted is not None and losses[best_of(losses)] < loss_at(fitted):  # the valley is not a parabola
        loss_at(best_of(losses) / 2)
    best = best_of(losses)
    return best, {f"{tried:.4g}": loss for tried, loss in sorted(losses.items()) if loss != float("inf")}


def best_of(losses: dict[float, float]) -> float:
    """Return the η with the smallest loss, and the smaller η of equal ones."""
    return min(losses, key=lambda eta: (losses[eta], eta))


def first_eta(base: BaseModel, basis: Basis, core: Tensor) -> float:
    """Return the η at which ‖η B M A‖_F is `FIRST_RELATIVE_CHANGE` of ‖W‖_F in the median module."""
    norms = torch.linalg.matrix_norm(core)
    weights = [base.model.get_submodule(shape.name).weight for shape in basis.manifest.modules]
    sizes = torch.stack([torch.linalg.matrix_norm(weight.detach().float()).cpu() for weight in weights])
    ratio = float((norms.cpu() / sizes.to(norms.dtype)).median())
    if not ratio > 0:
        raise InvalidInput("the step is zero in half of the modules", param="calibration")
    return FIRST_RELATIVE_CHANGE / ratio


def parabola_minimum(losses: dict[float, float]) -> float | None:
    """Return the minimum of the parabola through the best η and its neighbours, if it is between them."""
    etas = sorted(eta for eta in losses if losses[eta] != float("inf"))
    best = min(range(len(etas)), key=lambda index: losses[etas[index]])
    if not 0 < best < len(etas) - 1:
        return None
    a, b, c = etas[best - 1 : best + 2]
    fa, fb, fc = losses[a], losses[b], losses[c]
    numerator = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    denominator = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    if denominator == 0:
        return None
    eta = b - 0.5 * numerator / denominator
    return eta if a < eta < c else None
