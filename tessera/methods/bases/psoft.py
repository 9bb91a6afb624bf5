"""PSOFT (https://openreview.net/forum?id=FSHrinMArK): a rotation in the principal subspace of each weight.

    W = U S Vᵀ,   A' = V_rᵀ,   B' = U_r S_r,   delta_W = B' (diag(b) Q diag(a) - I) A'

Q [r, r] is orthogonal, Cayley's map of a skew-symmetric matrix, so that angles between the principal
directions are kept; b and a (`scales`) may stretch them. Training begins at Q = I and b = a = 1, the base
model. r (r - 1) / 2 + 2 r numbers are trained and stored per module instead of r².

As in PEFT 0.21 with `psoft_init`, whose `psoft_alpha` cancels. Its Neumann series is an option.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tessera.formats.basis import Basis, make_basis
from tessera.formats.cores import ORTHOGONAL
from tessera.formats.manifest import ModuleShape
from tessera.methods.bases.lora_xs import singular_triplets
from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Option, Options

_SCALES = {"both": ["b", "a"], "output": ["b"], "input": ["a"], "none": []}


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A' [r, d_in] and B' [d_out, r] of one weight [d_out, d_in]."""
    U, S, Vh, gap = singular_triplets(data.weight, data, which="top")
    return ModuleFactors(Vh, U * S, notes={"relative_gap": gap})


def assemble(
    *,
    model_id: str,
    method: str,
    factors: dict[ModuleShape, tuple[Tensor, Tensor]],
    recipe: dict[str, Any],
    dtype: str = "float32",
) -> Basis:
    """Make the basis, whose adapters are rotations."""
    options = recipe["options"]
    core = {"kind": ORTHOGONAL, "scales": _SCALES[options["scales"]], "terms": options["neumann_terms"]}
    return make_basis(
        model_id=model_id, method=method, factors=factors, recipe=recipe, dtype=dtype, core=core
    )


METHOD = Method(
    name="psoft",
    description="Rotations of the principal subspace of each weight, which keep its angles",
    paper="PSOFT, openreview FSHrinMArK",
    factorise=factorise,
    assemble=assemble,
    options={
        **COMMON_OPTIONS,
        "scales": Option(
            "both", "which sides of the rotation are stretched by trained numbers", choices=tuple(_SCALES)
        ),
        "neumann_terms": Option(
            0, "terms of the Neumann series instead of the exact inverse; 0: exact", minimum=0, maximum=32
        ),
    },
)
