"""The leading singular vectors of the summed gradient, without LoRA-SB's sign.

    g = U S Vᵀ,   A = V_rᵀ,   B = U_r      first step: -g restricted to the basis, R = -diag(S_r)

The optimal basis for one step of SGD: B Bᵀ g Aᵀ A is the best rank-r approximation of g (LoRA-SB, arXiv
2411.19557, theorem 6, which holds for the gradient itself and not for its sign).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.methods.building.collected import Needs
from tessera.methods.building.decomposition import check_numerical_rank, relative_gap
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A [r, d_in], B [d_out, r] orthonormal; step: -diag(S_r) of the mean gradient."""
    U, S, Vh, gap = gradient_triplets(data.statistics.g(), data)
    step = -torch.diag(S / data.statistics.counts.num_examples)
    return ModuleFactors(Vh, U, step, {"relative_gap": gap})


def gradient_triplets(X: Tensor, data: ModuleData) -> tuple[Tensor, Tensor, Tensor, float]:
    """U [d_out, r], S [r], Vh [r, d_in], the leading triplets of what the gradient became, and their gap.

    Raises `InvalidInput` if the calibration data span fewer than r directions.
    """
    U, S, Vh = data.decomposition.svd(X, data.rank, seed=data.seed)
    check_numerical_rank(S, data.rank, f"the gradient of {data.shape.name}")
    r = data.rank
    return U[:, :r], S[:r], Vh[:r], relative_gap(S, r)


def gradient_needs(rank: int, options: Options) -> Needs:
    return Needs(gradient=True)


METHOD = Method(
    name="gradient_svd",
    description="the leading singular vectors of the summed gradient of labelled examples",
    paper="LoRA-SB, arXiv 2411.19557, theorem 6",
    factorise=factorise,
    needs_calibration="labelled",
    options=DATA_OPTIONS,
    needs=gradient_needs,
)
