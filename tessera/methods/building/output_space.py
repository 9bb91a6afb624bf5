"""The choice of B for methods whose papers determine only A.

Statistics of the inputs do not determine B. With A = Vᵀ from any input statistic and *any* fixed orthonormal
B, the pair can express r / d_out of the part of an unknown target that a free B could (LoLoRA's theorem 4.4
with B frozen: E L = ½σ²(d_out tr Σ - r tr(VᵀΣV)), whatever B is). So B must come from the task or the
weights:

    grad    left singular vectors of g Aᵀ, the best rank-r output space for this A; needs labels
    wa      an orthonormal basis of the range of W Aᵀ, which the layer already writes for these inputs
    y       leading eigenvectors of the second moment of the output gradients; needs labels
    random  a lower bound

Measured held-out loss (rank 8, best rate of a sweep, A from EVA): grad 2.836, wa 2.850, random 2.872.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessera.methods.building.activations import InputRule
from tessera.methods.building.collected import Needs, Tokens
from tessera.methods.building.decomposition import (
    canonical_columns,
    check_numerical_rank,
    orthonormal_columns,
    random_orthonormal,
    smallest_eigenvectors,
)
from tessera.methods.building.method import ModuleData
from tessera.methods.options import Option

RULES = ("wa", "grad", "y", "random")
OUTPUT_RULE_OPTION = Option(
    "wa",
    "how B is chosen: from W Aᵀ, the gradient or the output gradients' second moment, or at random",
    choices=RULES,
)


def needs_for(rule: str, *, inputs: Callable[[str, int], InputRule], input_tokens: Tokens = "all") -> Needs:
    """Return the statistics that an input rule together with this output rule needs."""
    return Needs(
        gradient=rule == "grad",
        inputs=inputs,
        input_tokens=input_tokens,
        outputs="full" if rule == "y" else "none",
    )


def output_space(rule: str, A: Tensor, data: ModuleData) -> Tensor:
    """Return orthonormal B [d_out, r] for orthonormal A [r, d_in].

    Raises `InvalidInput` if the statistic has fewer than r directions.
    """
    if rule == "grad":
        U, S, _ = torch.linalg.svd(data.statistics.g().to(A) @ A.mT, full_matrices=False)
        check_numerical_rank(S, data.rank, f"the gradient of {data.shape.name} on its input space")
        return canonical_columns(U)
    if rule == "wa":
        image = data.weight.to(A) @ A.mT
        S = torch.linalg.svdvals(image)
        check_numerical_rank(S, data.rank, f"the weight of {data.shape.name} on its input space")
        return orthonormal_columns(image)
    if rule == "y":
        return smallest_eigenvectors(-data.statistics.Y(), data.rank, generator=data.generator())
    return random_orthonormal(data.shape.d_out, data.rank, data.generator())
