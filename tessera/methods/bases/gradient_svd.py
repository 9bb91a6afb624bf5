"""The leading singular vectors of the summed gradient, without LoRA-SB's sign (`gradient_space.py`).

The optimal basis for one step of SGD: B Bᵀ g Aᵀ A is the best rank-r approximation of g (LoRA-SB, arXiv
2411.19557, theorem 6, which holds for the gradient itself and not for its sign).
"""

from __future__ import annotations

from tessera.methods.building.gradient_space import gradient_factors, gradient_needs
from tessera.methods.building.method import DATA_OPTIONS, Method

METHOD = Method(
    name="gradient_svd",
    description="the leading singular vectors of the summed gradient of labelled examples",
    paper="LoRA-SB, arXiv 2411.19557, theorem 6",
    factorise=gradient_factors,
    needs_calibration="labelled",
    options=DATA_OPTIONS,
    needs=gradient_needs,
)
