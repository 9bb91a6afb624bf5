"""LoRA-XS (arXiv 2405.17604): the truncated SVD of each frozen weight.

    W = U Σ Vᵀ,   A' = Σ_r V_rᵀ,   B' = U_r                                              (section 3)

Needs no data. In canonical form A = V_rᵀ and B = U_r, and Σ_r becomes the training preconditioner P_in. Σ is
on the *input* side: the paper writes W for the transposed weight (h = x W + x A R B with A = U_r Σ_r), and
the authors' code uses `TruncatedSVD.transform(W.T)` = V_r Σ_r for lora_A.

The paper's ablations are options: bottom and middle vectors (appendix G), no Σ (appendix H), and random
factors and the SVD of a random matrix (table 4, appendix F). The paper leaves two points open:

* The bottom vectors of appendix G carry Σ_bottom, which also shrinks Adam's step. So "top beats bottom" is in
  part a learning rate (measured: bottom still improves at the largest rate). `with_sigma=False` tells the two
  apart.
* The authors' random factors call `kaiming_uniform_(a=√5)` on tensors [n, r] and [r, m], whose fan-in is r
  and m for torch. A' is therefore U(-1/√r, 1/√r) and B' is U(-1/√m, 1/√m), and `vectors="random"` uses these
  scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.methods.building.decomposition import Decomposition, check_numerical_rank, relative_gap
from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Option, Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A' [r, d_in] and B' [d_out, r] of one weight [d_out, d_in]."""
    if options["vectors"] == "random":
        return repo_random(data)
    weight = random_weight(data) if options["vectors"] == "svd_of_random" else data.weight
    U, S, Vh, gap = singular_triplets(weight, data, which=options["vectors"])
    A = Vh * S[:, None] if options["with_sigma"] else Vh
    return ModuleFactors(A, U, notes={"relative_gap": gap})


def singular_triplets(X: Tensor, data: ModuleData, *, which: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return U [d_out, r], S [r] and Vh [r, d_in] of X, and the relative gap below them.

    which: "top", "middle" or "bottom" triplets; any other name means "top". Raises `InvalidInput` if X is
    rank-deficient there, because the vectors of a null space are arbitrary.
    """
    rank = data.rank
    is_top = which not in ("middle", "bottom")
    decomposition = data.decomposition if is_top else Decomposition("exact")
    U, S, Vh = decomposition.svd(X, rank, seed=data.seed)
    if is_top:
        first = 0
    elif which == "bottom":
        first = len(S) - rank
    else:
        first = (len(S) - rank) // 2
    check_numerical_rank(S, first + rank, f"the weight of {data.shape.name}")
    part = slice(first, first + rank)
    return U[:, part], S[part], Vh[part], relative_gap(S, first + rank)


def repo_random(data: ModuleData) -> ModuleFactors:
    """Return uniform factors at the authors' scales: A' in ±1/√r, B' in ±1/√d_out."""
    generator = data.generator()
    r, d_in, d_out = data.rank, data.shape.d_in, data.shape.d_out
    A = (2 * torch.rand(r, d_in, generator=generator, dtype=torch.float64) - 1) / r**0.5
    B = (2 * torch.rand(d_out, r, generator=generator, dtype=torch.float64) - 1) / d_out**0.5
    return ModuleFactors(A, B)


def random_weight(data: ModuleData) -> Tensor:
    """Return a weight [d_out, d_in] as in an untrained linear layer: U(-1/√d_in, 1/√d_in)."""
    d_out, d_in = data.shape.d_out, data.shape.d_in
    uniform = 2 * torch.rand(d_out, d_in, generator=data.generator(), dtype=torch.float64) - 1
    weight: Tensor = (uniform / d_in**0.5).to(data.weight.device)
    return weight


METHOD = Method(
    name="lora_xs",
    description="The SVD of each weight; needs no data, so that one basis serves all users",
    paper="LoRA-XS, arXiv 2405.17604, section 3",
    factorise=factorise,
    options={
        **COMMON_OPTIONS,
        "vectors": Option(
            "top",
            "which singular vectors to use, or random factors",
            choices=("top", "middle", "bottom", "random", "svd_of_random"),
        ),
        "with_sigma": Option(
            True, "keep the singular values in A', as in the paper; if false, train in the orthonormal basis"
        ),
    },
)
