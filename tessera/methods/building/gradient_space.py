"""The leading singular vectors of the summed gradient, or of what a method makes of it.

g = U S Vᵀ,   A = V_rᵀ,   B = U_r      first step: -g restricted to the basis, R = -diag(S_r)
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.methods.building.collected import Needs
from tessera.methods.building.decomposition import check_numerical_rank, relative_gap
from tessera.methods.building.method import ModuleData, ModuleFactors
from tessera.methods.options import Options


def gradient_factors(data: ModuleData, options: Options) -> ModuleFactors:
    """Return orthonormal A [r, d_in] and B [d_out, r] with the step -diag(S_r) of the mean gradient."""
    U, S, Vh, gap = gradient_triplets(data.statistics.g(), data)
    step = -torch.diag(S / data.statistics.counts.num_examples)
    return ModuleFactors(Vh, U, step, {"relative_gap": gap})


def gradient_triplets(X: Tensor, data: ModuleData) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the leading triplets of X, which was made of the gradient: U [d_out, r], S [r], Vh [r, d_in].

    The last value is the relative gap behind them. Raises `InvalidInput` if the calibration data span fewer
    than r directions.
    """
    U, S, Vh = data.decomposition.svd(X, data.rank, seed=data.seed)
    check_numerical_rank(S, data.rank, f"the gradient of {data.shape.name}")
    r = data.rank
    return U[:, :r], S[:r], Vh[:r], relative_gap(S, r)


def gradient_needs(rank: int, options: Options) -> Needs:
    """Return the needs of a method that reads only the summed gradient."""
    return Needs(gradient=True)
