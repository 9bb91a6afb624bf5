"""PiSSA (arXiv 2404.02948): the principal part of W, split evenly. Needs no data.

    W = U Σ Vᵀ,   A' = √Σ_r V_rᵀ,   B' = U_r √Σ_r      (eqs 2 and 3)

The paper trains A' and B' on the residual W - B' A'. With frozen factors nothing has to be subtracted:
training R' from 0 on W is training it from the identity on the residual. It serves the same basis as
LoRA-XS; only the preconditioner differs (a gradient entry of the core is scaled by σ_i σ_j instead of
σ_j²).
"""

from __future__ import annotations

from tessera.methods.bases.lora_xs import singular_triplets
from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A' [r, d_in] and B' [d_out, r] with B' A' the best rank-r approximation of W."""
    return split_evenly(data, which="top")


def split_evenly(data: ModuleData, *, which: str) -> ModuleFactors:
    """√S Vᵀ and U √S for the chosen singular vectors of W."""
    U, S, Vh, gap = singular_triplets(data.weight, data, which=which)
    root = S.sqrt()
    return ModuleFactors(Vh * root[:, None], U * root, notes={"relative_gap": gap})


METHOD = Method(
    name="pissa",
    description="the principal singular vectors of each weight, singular values split between both factors",
    paper="PiSSA, arXiv 2404.02948, eqs 2-3",
    factorise=factorise,
    options=COMMON_OPTIONS,
)
