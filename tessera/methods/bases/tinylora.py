"""TinyLoRA (arXiv 2602.04118): a few numbers v for each user, mapped to R by fixed random matrices.

    W = U S Vᵀ,   A' = √S_r V_rᵀ,   B' = U_r √S_r,   R'_m = sum_i v_i P_mi

v [u] is trained. With `weight_tying` several modules share one v, down to a single one for the whole model:
u = 13 and `weight_tying` = 1 are the 13 numbers of the paper's title. P_mi [r, r] has entries N(0, 1 / r) and
differs between modules, so that tied modules still change in different directions. P is stored with the
basis, once for all users, and never made again.

A', B' and P are distributed as in PEFT 0.21, but two things differ: the groups of modules are as equal as
possible (PEFT's last group takes what its division leaves, 25 of 60 modules at 0.4), and P is drawn from
other seeds, so an adapter of PEFT is imported into a basis of its own (`tessera/peft/tinylora.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.formats.basis import Basis, make_basis
from tessera.formats.cores import MAX_PROJECTION_BYTES, SPANNED
from tessera.formats.manifest import ModuleShape
from tessera.methods.bases import pissa
from tessera.methods.building.decomposition import module_seed
from tessera.methods.building.method import COMMON_OPTIONS, Method
from tessera.methods.options import Option


def assemble(
    *,
    model_id: str,
    method: str,
    factors: dict[ModuleShape, tuple[Tensor, Tensor]],
    recipe: dict[str, Any],
    dtype: str = "float32",
) -> Basis:
    """Make the basis with P [M, u, r, r]. Raises `InvalidInput` if P would be too large."""
    options, rank = recipe["options"], recipe["rank"]
    u, M = options["num_vectors"], len(factors)
    if 4 * u * M * rank * rank > MAX_PROJECTION_BYTES:
        most = MAX_PROJECTION_BYTES // (4 * M * rank * rank)
        raise InvalidInput(
            f"num_vectors {u} needs {u * M * rank * rank} fixed numbers at rank {rank}; with {M} modules at "
            f"most {most} are possible, or a smaller rank",
            param="num_vectors",
        )
    P = [_projection(shape, u, rank, seed=options["seed"]) for shape in factors]
    core = {"kind": SPANNED, "num_vectors": u, "groups": equal_groups(M, options["weight_tying"])}
    return make_basis(
        model_id=model_id, method=method, factors=factors, recipe=recipe, dtype=dtype, core=core,
        projection=torch.stack(P),
    )  # fmt: skip


def equal_groups(num_modules: int, weight_tying: float) -> list[int]:
    """Return the group of each module in model order: runs of neighbours, as equal in size as possible.

    weight_tying: 0 gives each module a group of its own, 1 puts all into one.
    """
    num_groups = max(1, round(num_modules * (1 - weight_tying)))
    return [index * num_groups // num_modules for index in range(num_modules)]


def _projection(shape: ModuleShape, u: int, rank: int, *, seed: int) -> Tensor:
    """Draw P_m [u, r, r]. Rows and columns that a narrow module cannot use are as good as absent."""
    generator = torch.Generator().manual_seed(module_seed(seed, "tinylora/P", shape.name, rank))
    P: Tensor = torch.randn(u, rank, rank, generator=generator) / rank**0.5
    return P


METHOD = Method(
    name="tinylora",
    description="A few numbers per user: R is a sum of fixed random matrices between the SVD of each weight",
    paper="TinyLoRA, arXiv 2602.04118",
    factorise=pissa.factorise,
    assemble=assemble,
    options={
        **COMMON_OPTIONS,
        "num_vectors": Option(64, "u, how many numbers a group of modules has", minimum=1, maximum=4096),
        "weight_tying": Option(
            0.0, "share of groups saved: 0 gives each module its own numbers, 1 one set to the whole model",
            minimum=0.0, maximum=1.0,
        ),
    },
)  # fmt: skip
