"""Moving an adapter from one basis to another of the same base model.

    M' = argmin ‖B_1 M A_1 - B_2 M' A_2‖_F = B_2ᵀ B_1 M A_1 A_2ᵀ      for orthonormal A_2, B_2

The part of ΔW outside the new basis is lost: 1 - ‖M'‖² / ‖M‖² of its energy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.errors import BasisMismatch
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis


def rebase(adapter: Adapter, old: Basis, new: Basis) -> tuple[Adapter, float]:
    """Return the nearest adapter in the new basis, and the lost share of ‖ΔW‖² summed over all modules.

    A module that only the old basis has is lost as a whole; one that only the new basis has gets zeros. The
    ranks may differ. An adapter of zeros loses nothing. Raises `BasisMismatch` if the adapter does not belong
    to the old basis, or if the bases belong to different models.
    """
    if adapter.basis_id != old.basis_id:
        raise BasisMismatch(f"the adapter belongs to basis {adapter.basis_id}, not to {old.basis_id}")
    if old.manifest.model_id != new.manifest.model_id:
        raise BasisMismatch(
            f"basis {new.basis_id} belongs to model {new.manifest.model_id}, not to {old.manifest.model_id}"
        )
    places = {module: index for index, module in enumerate(new.manifest.modules)}
    R = torch.zeros(new.num_modules, new.rank, new.rank)
    total = kept = 0.0
    for i, module in enumerate(old.manifest.modules):
        M = adapter.R[i].double()
        total += _energy(M, old.A[i], old.B[i])
        j = places.get(module)
        if j is None:
            continue
        left = left_inverse(new.B[j]) @ old.B[i].double()
        right = old.A[i].double() @ left_inverse(new.A[j].mT).mT
        projected = left @ M @ right
        R[j] = projected.float()
        kept += _energy(projected, new.A[j], new.B[j])
    loss = 0.0 if total == 0 else max(0.0, 1 - kept / total)
    metadata = {**adapter.metadata, "rebased_from": old.basis_id, "relative_loss": loss}
    return Adapter(new.basis_id, R, metadata), loss


def project(delta: Tensor, basis: Basis, index: int) -> Tensor:
    """Return the core M [r, r] float64 with B M A nearest to `delta` [d_out, d_in] in module `index`."""
    left = left_inverse(basis.B[index].to(delta.device)).to(delta)
    right = left_inverse(basis.A[index].mT.to(delta.device)).to(delta)
    return (left @ delta @ right.mT).double()


def left_inverse(X: Tensor) -> Tensor:
    """Return (XᵀX)^-1 Xᵀ [r, n] in float64: Xᵀ for orthonormal columns, and exact for rounded ones."""
    X = X.double()
    inverse: Tensor = torch.linalg.solve(X.mT @ X, X.mT)
    return inverse


def _energy(M: Tensor, A: Tensor, B: Tensor) -> float:
    """Return ‖B M A‖_F², computed from the Gram matrices of the factors."""
    A, B = A.double(), B.double()
    return float(((B.mT @ B) @ M * (M @ (A @ A.mT))).sum())
