"""The leading singular vectors of the summed gradient: LoRA-SB without the sign.

    g = U S Vᵀ,   A = V_rᵀ,   B = U_r,   first step R = -diag(S_r), which is -g restricted to the basis

Needs labelled examples. This is the optimal basis for one step of SGD, because B Bᵀ g Aᵀ A is the best rank-r
approximation of g (LoRA-SB, arXiv 2411.19557, theorem 6, which holds for the gradient and not for its sign).
`building/gradient_space.py` computes it.
"""

from __future__ import annotations

from tessera.methods.building.gradient_space import gradient_factors, gradient_needs
from tessera.methods.building.method import DATA_OPTIONS, Method

METHOD = Method(
    name="gradient_svd",
    description="The leading singular vectors of the summed gradient of labelled examples",
    paper="LoRA-SB, arXiv 2411.19557, theorem 6",
    factorise=gradient_factors,
    needs_calibration="labelled",
    options=DATA_OPTIONS,
    needs=gradient_needs,
)
