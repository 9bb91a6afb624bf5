"""Where noise and signal balance: K-FAC's inverse Fisher factors and LoRA-DA's eigenproblems.

The algebra of `lora_da.py` alone: matrices in, matrices out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_core.bases.decomposition import smallest_eigenvectors
from adapter_core.errors import InvalidInput

#: Alternating steps of the two-sided form; it ends when the bound falls by less than 1e-9 of itself.
MAX_ALTERNATIONS = 50


@dataclass(frozen=True)
class Fisher:
    """The inverse K-FAC factors. Z_inv: [d_in, d_in];  Y_inv: [d_out], the diagonal D, or [d_out, d_out]."""

    Z_inv: Tensor
    Y_inv: Tensor

    @property
    def output_trace(self) -> float:
        """tr D, the sum of the output side's inverse."""
        return float(self.Y_inv.sum() if self.Y_inv.dim() == 1 else self.Y_inv.trace())

    def natural_step(self, g: Tensor) -> Tensor:
        """Δ = -Y^-1 g Z^-1, [d_out, d_in]."""
        scaled = self.Y_inv[:, None] * g if self.Y_inv.dim() == 1 else self.Y_inv @ g
        return -scaled @ self.Z_inv


def invert_fisher(Z: Tensor, Y: Tensor, *, damping: float, is_relative: bool, name: str) -> Fisher:
    """Damped inverses of the factors. Y: [d_out], its diagonal, or [d_out, d_out]. Raises `InvalidInput`."""
    diagonal = Y if Y.dim() == 1 else Y.diagonal()
    size_z = float(Z.diagonal().mean()) if is_relative else 1.0
    size_y = float(diagonal.median() or diagonal.mean()) if is_relative else 1.0
    lambda_z, lambda_y = damping * size_z, damping * size_y
    if not (lambda_z > 0 and lambda_y > 0):
        raise InvalidInput(f"the damping of {name} is {lambda_z:g} and {lambda_y:g}", param="calibration")
    Z_inv = _damped_inverse(Z, lambda_z, f"the input moment of {name}")
    if Y.dim() == 1:
        return Fisher(Z_inv, 1 / (Y.to(Z_inv) + lambda_y))
    return Fisher(Z_inv, _damped_inverse(Y, lambda_y, f"the output moment of {name}").to(Z_inv))


def guidance(
    fisher: Fisher, delta: Tensor, *, variance: float, use_variance: bool = True, use_bias: bool = True
) -> Tensor:
    """Ω = variance Z^-1 - ΔᵀΔ [d_in, d_in], symmetric. variance: tr D / N with its weight."""
    omega = torch.zeros_like(fisher.Z_inv)
    if use_variance:
        omega += variance * fisher.Z_inv
    if use_bias:
        omega -= delta.mT @ delta
    return (omega + omega.mT) / 2


def two_sided(fisher: Fisher, delta: Tensor, rank: int, *, inverse_n: float) -> tuple[Tensor, Tensor]:
    """A [r, d_in], B [d_out, r] that minimise the two-sided bound, alternately, from the SVD of Δ.

    fisher: with the full Y_inv. Each half step solves its eigenproblem exactly, so the bound never rises.
    """
    U, _, Vh = torch.linalg.svd(delta, full_matrices=False)
    A, B = Vh[:rank], U[:, :rank]
    best = two_sided_bound(fisher, delta, A, B, inverse_n=inverse_n)
    for _ in range(MAX_ALTERNATIONS):
        left = B.mT @ delta
        weight = inverse_n * float((B.mT @ fisher.Y_inv @ B).trace())
        A = smallest_eigenvectors(weight * fisher.Z_inv - left.mT @ left, rank, solver="eigh").mT.to(delta)
        right = delta @ A.mT
        weight = inverse_n * float((A @ fisher.Z_inv @ A.mT).trace())
        B = smallest_eigenvectors(weight * fisher.Y_inv - right @ right.mT, rank, solver="eigh").to(delta)
        bound = two_sided_bound(fisher, delta, A, B, inverse_n=inverse_n)
        if best - bound <= 1e-9 * abs(best):
            break
        best = bound
    return A, B


def two_sided_bound(fisher: Fisher, delta: Tensor, A: Tensor, B: Tensor, *, inverse_n: float) -> float:
    """(1/N) tr(A Z^-1 Aᵀ) tr(Bᵀ Y^-1 B) + ‖Δ‖² - ‖Bᵀ Δ Aᵀ‖² for orthonormal A, B."""
    variance = float((A @ fisher.Z_inv @ A.mT).trace()) * float((B.mT @ fisher.Y_inv @ B).trace())
    kept = float((B.mT @ delta @ A.mT).square().sum())
    return inverse_n * variance + float(delta.square().sum()) - kept


def _damped_inverse(X: Tensor, damping: float, what: str) -> Tensor:
    damped = (X + X.mT) / 2 + damping * torch.eye(len(X), dtype=X.dtype, device=X.device)
    L, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        raise InvalidInput(f"{what} with damping {damping:g} is not positive definite", param="damping")
    inverse: Tensor = torch.cholesky_inverse(L)
    return inverse
