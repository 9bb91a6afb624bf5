"""Random orthonormal factors: the control that every other basis has to beat. Needs no data.

The r × r form of all methods whose A and B start at random and are then trained (LoRA, rsLoRA, LoRA+) or of
which only A is frozen (LoRA-FA, arXiv 2308.03303). rsLoRA's α/√r is `scale`.
"""

from __future__ import annotations

from tessera.methods.building.decomposition import random_orthonormal
from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A [r, d_in], B [d_out, r], independent and uniform on their Stiefel manifolds."""
    generator = data.generator()
    A = random_orthonormal(data.shape.d_in, data.rank, generator)
    B = random_orthonormal(data.shape.d_out, data.rank, generator)
    return ModuleFactors(A.mT, B)


METHOD = Method(
    name="random",
    description="random orthonormal factors, the control",
    paper="LoRA-XS, arXiv 2405.17604, table 4; LoRA-FA, arXiv 2308.03303",
    factorise=factorise,
    options=COMMON_OPTIONS,
)
