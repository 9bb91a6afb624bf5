"""A plain LoRA as a basis of its own and the one adapter in it: stored and served like every other.

    delta_W = s B A = B̂ R Â            B̂, Â: orthonormal factors of B and A by QR,  R = s L_B L_Aᵀ

Exact, whatever the ranks: a module with fewer directions than the others is filled up with orthonormal ones
that its core does not use. It costs what LoRA costs (r numbers for each input and output), where an adapter
in a shared basis costs r² per module, so such bases belong to a tenant and count against a quota
(`own_bases.py`). Knows neither where a LoRA comes from nor where it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_core.adapter import MAX_RANK, Adapter
from adapter_core.basis import Basis, ModuleShape, make_basis
from adapter_core.errors import InvalidInput


@dataclass(frozen=True)
class LowRank:
    """The change of one module, delta_W = scale · B A. A: [k, d_in], B: [d_out, k], any float dtype."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Dedicated:
    """A basis and the one adapter that lives in it."""

    basis: Basis
    adapter: Adapter


def make_dedicated(
    changes: Mapping[ModuleShape, LowRank],
    *,
    model_id: str,
    method: str,
    recipe: dict[str, Any],
    metadata: dict[str, Any],
    dtype: str = "float32",
) -> Dedicated:
    """The basis, of the largest rank among the modules, and its adapter. metadata: of the adapter.

    dtype: of the stored factors; R is float32. Equal changes give equal bytes on one machine. Raises
    `InvalidInput` for a rank that not every module has room for, and for values that are not finite.
    """
    rank = max(change.rank for change in changes.values())
    check_room(rank, changes)
    orthonormal, cores = {}, []
    for shape, change in changes.items():
        missing = rank - change.rank
        # Zero columns come back from QR as orthonormal ones, and so do those that B = 0 leaves open.
        Q_A, L_A = torch.linalg.qr(F.pad(change.A.detach().cpu().double().mT, (0, missing)))
        Q_B, L_B = torch.linalg.qr(F.pad(change.B.detach().cpu().double(), (0, missing)))
        orthonormal[shape] = (Q_A.mT.float(), Q_B.float())  # all at once: float64 would be twice the memory
        cores.append(change.scale * L_B @ L_A.mT)
    basis = make_basis(model_id=model_id, method=method, factors=orthonormal, recipe=recipe, dtype=dtype)
    # make_basis may turn the sign of a column; the fold follows it.
    R = basis.fold(torch.stack(cores)).float().contiguous()
    return Dedicated(basis, Adapter(basis.basis_id, R, metadata))


def check_room(rank: int, changes: Mapping[ModuleShape, LowRank]) -> None:
    """Raises `InvalidInput` if a basis of this rank and these modules cannot be."""
    side, name = min((min(shape.d_in, shape.d_out), shape.name) for shape in changes)
    if rank > min(side, MAX_RANK):
        limit = f"the smaller side {side} of {name}" if side < MAX_RANK else f"{MAX_RANK}, the largest rank"
        raise InvalidInput(f"rank {rank} exceeds {limit}", param="rank")
