"""LoRA-GA (arXiv 2407.05000): the leading singular vectors of the gradient, in a form that works when frozen.

    g = U S Vᵀ,   A' = c V_rᵀ,   B' = c U_r,   c = d_out^{1/4} / √γ

Needs labelled examples. The authors' default, "ArB2r", takes *different* indices: A from V[:r] and B from
U[r:2r], which is the best first step of A and B together (theorem 3.1; `lora_form` computes it). As a frozen
pair it is useless: the gradient of R at zero is Bᵀ g Aᵀ = U[r:2r]ᵀ g V[:r] = 0. The r × r form therefore uses
the same indices on both sides, which makes it LoRA-SB without the sign, and refuses "ArB2r".

PEFT's port multiplies B by S and scales B alone. We follow the authors, who do neither.
"""

from __future__ import annotations

from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.building.decomposition import Decomposition
from tessera.methods.building.gradient_space import gradient_needs, gradient_triplets
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.checks import check_lora_ga
from tessera.methods.options import Option, Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A' [r, d_in] and B' [d_out, r] from the same singular vectors of the gradient."""
    U, _, Vh, gap = gradient_triplets(data.statistics.g(), data)
    c = stable_scale(data.shape.d_out, options["gamma"])
    return ModuleFactors(c * Vh, c * U, notes={"relative_gap": gap})


def lora_form(g: Tensor, rank: int, *, gamma: float = 16.0) -> tuple[Tensor, Tensor]:
    """Return A_0 [r, d_in] and B_0 [d_out, r] of the authors' default ArB2r, for training both factors.

    The first step of gradient descent on both moves B A along the best rank-2r approximation of g.
    """
    if 2 * rank > min(g.shape):
        raise InvalidInput(
            f"rank must be at most {min(g.shape) // 2} (half of the smaller side), got {rank}", param="rank"
        )
    U, _, Vh = Decomposition("exact").svd(g, 2 * rank, seed=0)
    c = stable_scale(g.shape[0], gamma)
    return c * Vh[:rank], c * U[:, rank : 2 * rank]


def stable_scale(d_out: int, gamma: float) -> float:
    """Return c = d_out^{1/4} / √γ for both factors: the change of the output is independent of the width."""
    return float(d_out**0.25 / gamma**0.5)


METHOD = Method(
    name="lora_ga",
    description="The leading singular vectors of the gradient, at LoRA-GA's scale",
    paper="LoRA-GA, arXiv 2407.05000, theorem 3.1 (same indices on both sides, see the docs)",
    factorise=factorise,
    needs_calibration="labelled",
    options={
        **DATA_OPTIONS,
        "gamma": Option(
            16.0, "γ of the stable scale (16 in the authors' code; 64 in the paper, for LLMs)", minimum=1e-6
        ),
        "direction": Option(
            "ArBr",
            "singular vectors of A and B; ArB2r does not train with frozen factors",
            choices=("ArBr", "ArB2r"),
        ),
    },
    needs=gradient_needs,
    check=check_lora_ga,
)
