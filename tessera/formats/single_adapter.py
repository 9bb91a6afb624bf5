"""A plain LoRA as a basis of its own and the one adapter in it: stored and served like every other.

    delta_W = s B A = B̂ R Â            B̂, Â: orthonormal factors of B and A by QR,  R = s L_B L_Aᵀ

Exact, whatever the ranks: a module with fewer directions than the others is filled up with orthonormal ones
that its core does not use, and with zeros where it is too narrow for so many. A LoRA of a larger rank than
the module's smaller side is multiplied out first: B A has no more directions than that. It costs what LoRA
costs (r numbers for each input and output), where an adapter in a shared basis costs r² per module, so such
bases belong to a tenant and count against a quota (`ownership.py`). Knows neither where a LoRA comes from nor
where it goes.
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
    """The change of one module, delta_W = scale · B A. A: [k, d_in], B: [d_out, k], any float dtype."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class SingleAdapter:
    """A basis and the one adapter that lives in it."""

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
    """The basis, of `stored_rank`, and its adapter. metadata: of the adapter.

    dtype: of the stored factors; R is float32. Equal changes give equal bytes on one machine. Raises
    `InvalidInput` for too large a rank, and for values that are not finite.
    """
    rank = stored_rank(changes)
    orthonormal, cores = {}, []
    for shape, change in changes.items():
        A, B = _representable(change.A.detach().cpu().double(), change.B.detach().cpu().double())
        room = min(rank, shape.d_in, shape.d_out)
        # Zero columns come back from QR as orthonormal ones, and so do those that B = 0 leaves open.
        Q_A, L_A = torch.linalg.qr(F.pad(A.mT, (0, room - len(A))))
        Q_B, L_B = torch.linalg.qr(F.pad(B, (0, room - len(A))))
        unused = (0, rank - room)
        # All at once, so in float32: float64 would be twice the memory.
        orthonormal[shape] = (F.pad(Q_A, unused).mT.float(), F.pad(Q_B, unused).float())
        cores.append(F.pad(change.scale * L_B @ L_A.mT, unused + unused))
    basis = make_basis(model_id=model_id, method=method, factors=orthonormal, recipe=recipe, dtype=dtype)
    # make_basis may turn the sign of a column; the fold follows it.
    R = basis.fold(torch.stack(cores)).float().contiguous()
    return SingleAdapter(basis, Adapter(basis.basis_id, R, metadata))


def stored_rank(changes: Mapping[ModuleShape, LowRank]) -> int:
    """The rank of a basis for these changes: the most directions that one of them has. Raises `InvalidInput`
    above `MAX_RANK`."""
    ranks = {shape: min(change.rank, shape.d_in, shape.d_out) for shape, change in changes.items()}
    widest = max(ranks, key=ranks.__getitem__)
    if ranks[widest] > MAX_RANK:
        raise InvalidInput(
            f"rank {ranks[widest]} of {widest.name} exceeds {MAX_RANK}, the largest rank", param="rank"
        )
    return ranks[widest]


def _representable(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [k, d_in], [d_out, k] of the same product with k no larger than its smaller side."""
    rank, d_in, d_out = len(A), A.shape[1], B.shape[0]
    if rank <= min(d_in, d_out):
        return A, B
    product, one = B @ A, torch.eye(min(d_in, d_out), dtype=A.dtype)
    return (product, one) if d_out <= d_in else (one, product)
