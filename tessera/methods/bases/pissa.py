"""PiSSA (arXiv 2404.02948): the principal part of W, with the singular values split evenly.

    W = U Σ Vᵀ,   A' = √Σ_r V_rᵀ,   B' = U_r √Σ_r                                        (eqs 2 and 3)

Needs no data. The paper trains A' and B' on the residual W - B' A'. With frozen factors nothing has to be
subtracted, because training R' from 0 on W is the same as training it from the identity on the residual. The
served basis is that of LoRA-XS; only the preconditioner differs, as it scales a gradient entry of the core by
σ_i σ_j instead of σ_j².
"""

from __future__ import annotations

from tessera.methods.bases.lora_xs import singular_triplets
from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A' [r, d_in] and B' [d_out, r]; B' A' is the best rank-r approximation of W."""
    return split_evenly(data, which="top")


def split_evenly(data: ModuleData, *, which: str) -> ModuleFactors:
    """Return √S Vᵀ and U √S for the chosen singular vectors of W (see `singular_triplets`)."""
    U, S, Vh, gap = singular_triplets(data.weight, data, which=which)
    root = S.sqrt()
    return ModuleFactors(Vh * root[:, None], U * root, notes={"relative_gap": gap})


METHOD = Method(
    name="pissa",
    description="The principal singular vectors of each weight; A and B share the singular values",
    paper="PiSSA, arXiv 2404.02948, eqs 2-3",
    factorise=factorise,
    options=COMMON_OPTIONS,
)
