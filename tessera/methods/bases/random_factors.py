"""Random orthonormal factors, the control that every other basis has to beat.

    A, Bᵀ: r random orthonormal rows, independent of each other

Needs no data. This is the r × r form of all methods that initialize A and B at random: those that then train
both (LoRA, rsLoRA, LoRA+) and those that freeze A (LoRA-FA, arXiv 2308.03303). For rsLoRA's α/√r use the
option `scale`.
"""

from __future__ import annotations

from tessera.methods.building.decomposition import random_orthonormal
from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A [r, d_in] and B [d_out, r], independent and uniform on their Stiefel manifolds."""
    generator = data.generator()
    A = random_orthonormal(data.shape.d_in, data.rank, generator)
    B = random_orthonormal(data.shape.d_out, data.rank, generator)
    return ModuleFactors(A.mT, B)


METHOD = Method(
    name="random",
    description="Random orthonormal factors, the control that other bases have to beat",
    paper="LoRA-XS, arXiv 2405.17604, table 4; LoRA-FA, arXiv 2308.03303",
    factorise=factorise,
    options=COMMON_OPTIONS,
)
