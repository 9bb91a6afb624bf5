"""CorDA (arXiv 2406.05223): the SVD of W, weighted by the covariance of its inputs.

    C = mean over examples of x̃ᵀ x̃,   x̃ = x / |max x|
    W C = U S Vᵀ,   A' = √S_r V_rᵀ C^-1,   B' = U_r √S_r                       (eqs 2 to 4)

The option `mode` chooses the directions. "ipm" ("instruction-previewed") takes the first r, which the
calibration task uses; "kpm" ("knowledge-preserved") takes the last r, away from what the calibration text
needs. As in PEFT and the authors' code, C + λI is inverted instead of C: λ starts at 0.01 · mean diag C and
is doubled until ‖(C + λI)(C + λI)^-1 - I‖_F < 0.05.

Needs text. Unlike the paper, nothing is subtracted from W, because the factors are frozen (see `pissa.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.building.activations import InputRule, ScaledMoment
from tessera.methods.building.collected import Needs
from tessera.methods.building.decomposition import MAX_DOUBLE_SIDE, Decomposition, relative_gap
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Option, Options

#: The first λ, as a multiple of the mean of C's diagonal.
DAMPING = 0.01
#: λ is doubled until ‖(C + λI)(C + λI)^-1 - I‖_F falls below this.
MAX_INVERSE_ERROR = 0.05
MAX_DOUBLINGS = 40


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A' [r, d_in] and B' [d_out, r] with B' A' = U_r S_r V_rᵀ C^-1."""
    rule = data.statistics.inputs
    assert isinstance(rule, ScaledMoment)
    C, inverse = damped_inverse(rule.moment, data.shape.name)
    is_kpm = options["mode"] == "kpm"
    decomposition = Decomposition("exact") if is_kpm else data.decomposition
    U, S, Vh = decomposition.svd(data.weight.to(C) @ C, data.rank, seed=data.seed)
    part = slice(len(S) - data.rank, len(S)) if is_kpm else slice(data.rank)
    root = S[part].sqrt()
    A = (Vh[part] @ inverse.to(Vh)) * root[:, None]
    gap = relative_gap(S, data.rank)
    return ModuleFactors(A, U[:, part] * root, notes={} if is_kpm else {"relative_gap": gap})


def damped_inverse(C: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return C + λI and its inverse, both [d_in, d_in]. Raises `InvalidInput` if C is zero."""
    mean = float(torch.diagonal(C).mean())
    if not mean > 0:
        raise InvalidInput(f"the mean square of the inputs of {name} is {mean}", param="calibration")
    C = C.double() if len(C) <= MAX_DOUBLE_SIDE else C
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    damping = DAMPING
    for _ in range(MAX_DOUBLINGS):
        damped = C + damping * mean * identity
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, identity)) < MAX_INVERSE_ERROR:
            return damped, inverse
        damping *= 2
    raise InvalidInput(f"the covariance of the inputs of {name} cannot be inverted", param="calibration")


def make_rule(name: str, width: int) -> InputRule:
    return ScaledMoment(width)


def needs(rank: int, options: Options) -> Needs:
    return Needs(inputs=make_rule)


METHOD = Method(
    name="corda",
    description="The SVD of each weight, weighted by the covariance of its inputs on a text",
    paper="CorDA, arXiv 2406.05223, eqs 2-4",
    factorise=factorise,
    needs_calibration="text",
    options={
        **DATA_OPTIONS,
        "mode": Option("ipm", "use the first (ipm) or the last (kpm) directions", choices=("ipm", "kpm")),
    },
    needs=needs,
)
