"""A plain LoRA as a private basis with the one adapter in it, stored and served like every other.

    delta_W = s B A = B̂ R Â            B̂, Â: orthonormal factors of B and A by QR,  R = s L_B L_Aᵀ

This is exact for all ranks. A module with fewer directions than the others is filled up with orthonormal
directions that its core does not use, and with zeros if it is too narrow for so many. A LoRA with a larger
rank than the smaller side of a module is multiplied out first, because B A has no more directions than that.

Such a basis costs what LoRA costs (r numbers for each input and output), while an adapter in a shared basis
costs r² per module. Therefore it belongs to a tenant and counts against a quota
(`tessera/store/ownership.py`). This module knows neither where a LoRA comes from nor where it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.errors import InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import MAX_RANK
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape


@dataclass(frozen=True)
class LowRank:
    """The change of one module, delta_W = scale · B A, in any float dtype."""

    A: Tensor  # [k, d_in]
    B: Tensor  # [d_out, k]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class SingleAdapter:
    """A basis and the one adapter in it."""

    basis: Basis
    adapter: Adapter


def make_single_adapter(
    changes: Mapping[ModuleShape, LowRank],
    *,
    model_id: str,
    method: str,
    recipe: dict[str, Any],
    metadata: dict[str, Any],
    dtype: str = "float32",
) -> SingleAdapter:
    """Make the basis, with the rank `stored_rank`, and its adapter.

    metadata: that of the adapter. dtype: that of the stored factors, while R is float32. On one machine,
    equal changes give equal bytes. Raises `InvalidInput` for a rank that is too large and for values that are
    not finite.
    """
    rank = stored_rank(changes)
    orthonormal, cores = {}, []
    for shape, change in changes.items():
        A, B = _representable(change.A.detach().cpu().double(), change.B.detach().cpu().double())
        width = min(rank, shape.d_in, shape.d_out)
        # QR turns zero columns into orthonormal ones, also where B = 0.
        Q_A, L_A = torch.linalg.qr(F.pad(A.mT, (0, width - len(A))))
        Q_B, L_B = torch.linalg.qr(F.pad(B, (0, width - len(A))))
        unused = (0, rank - width)
        # The factors of all modules are in memory at once, so in float32: float64 would take twice as much.
        orthonormal[shape] = (F.pad(Q_A, unused).mT.float(), F.pad(Q_B, unused).float())
        cores.append(F.pad(change.scale * L_B @ L_A.mT, unused + unused))
    basis = make_basis(model_id=model_id, method=method, factors=orthonormal, recipe=recipe, dtype=dtype)
    # make_basis may flip the sign of a column; `fold` applies the same flip to R.
    R = basis.fold(torch.stack(cores)).float().contiguous()
    return SingleAdapter(basis, Adapter(basis.basis_id, R, metadata))


def stored_rank(changes: Mapping[ModuleShape, LowRank]) -> int:
    """Return the rank of a basis for these changes: the largest number of directions of one of them.

    Raises `InvalidInput` above `MAX_RANK`.
    """
    ranks = {shape: min(change.rank, shape.d_in, shape.d_out) for shape, change in changes.items()}
    widest = max(ranks, key=ranks.__getitem__)
    if ranks[widest] > MAX_RANK:
        raise InvalidInput(
            f"{widest.name} has rank {ranks[widest]}; the largest rank is {MAX_RANK}", param="rank"
        )
    return ranks[widest]


def _representable(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors [k, d_in], [d_out, k] of the same product, with k at most its smaller side."""
    rank, d_in, d_out = len(A), A.shape[1], B.shape[0]
    if rank <= min(d_in, d_out):
        return A, B
    product, identity = B @ A, torch.eye(min(d_in, d_out), dtype=A.dtype)
    return (product, identity) if d_out <= d_in else (identity, product)
