"""The algebra of `lora_da.py`: K-FAC's inverse Fisher factors, and the eigenproblems that weigh noise against
signal. Matrices in, matrices out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.building.decomposition import smallest_eigenvectors

#: Maximal number of alternating steps of the two-sided form. It ends earlier when the bound falls by less
#: than 1e-9 of itself.
MAX_ALTERNATIONS = 50
#: The relative rounding of the moments. Products of activations are float32, whatever dtype the sums have.
SUM_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Fisher:
    """The inverse K-FAC factors of one module."""

    #: [d_in, d_in]
    Z_inv: Tensor
    #: [d_out], the diagonal D, or [d_out, d_out]
    Y_inv: Tensor
    #: [d_in, k], orthonormal: input directions in which the data has nothing but rounding; None if
    #: `damped_inverse` did not have to look for them.
    unseen_in: Tensor | None = None
    #: [d_out, l], the same on the output side.
    unseen_out: Tensor | None = None

    @property
    def output_trace(self) -> float:
        """tr D, the trace of the output side's inverse."""
        return float(self.Y_inv.sum() if self.Y_inv.dim() == 1 else self.Y_inv.trace())

    def diagonal_blocks(self) -> Fisher:
        """Return the factors of J^-1's diagonal blocks, [Y^-1]_jj Z^-1, for the full Y^-1 (theorem 4.2)."""
        return Fisher(self.Z_inv, self.Y_inv.diagonal().clone(), self.unseen_in, self.unseen_out)

    def natural_step(self, g: Tensor, *, overwrite: bool = False) -> Tensor:
        """Return Δ = -Y^-1 g Z^-1 [d_out, d_in], with 0 in the directions that the data does not have.

        The gradient is a sum of δ xᵀ over the data, so in those directions it is rounding, which the factor
        1 / λ would make the largest part of the step. overwrite: g may be overwritten.
        """
        if self.unseen_in is not None:
            g = g - (g @ self.unseen_in) @ self.unseen_in.mT
        if self.unseen_out is not None:
            g = g - self.unseen_out @ (self.unseen_out.mT @ g)
        if self.Y_inv.dim() == 2:
            g = self.Y_inv @ g
        elif overwrite:
            g *= self.Y_inv[:, None]
        else:
            g = self.Y_inv[:, None] * g
        return (g @ self.Z_inv).neg_()


def invert_fisher(Z: Tensor, Y: Tensor, *, damping: float, is_relative: bool, name: str) -> Fisher:
    """Invert the damped factors. Y: [d_out] (its diagonal) or [d_out, d_out]. Raises `InvalidInput`."""
    diagonal = Y if Y.dim() == 1 else Y.diagonal()
    size_z = float(Z.diagonal().mean()) if is_relative else 1.0
    size_y = float(diagonal.median() or diagonal.mean()) if is_relative else 1.0
    lambda_z, lambda_y = damping * size_z, damping * size_y
    if not (lambda_z > 0 and lambda_y > 0):
        raise InvalidInput(f"the damping of {name} is {lambda_z:g} and {lambda_y:g}", param="calibration")
    Z_inv, unseen_in = damped_inverse(Z, lambda_z, f"the input moment of {name}")
    if Y.dim() == 1:
        return Fisher(Z_inv, 1 / (Y.to(Z_inv) + lambda_y), unseen_in)
    Y_inv, unseen_out = damped_inverse(Y.to(Z_inv), lambda_y, f"the output moment of {name}")
    return Fisher(Z_inv, Y_inv, unseen_in, unseen_out)


def guidance(
    fisher: Fisher, delta: Tensor, *, variance: float, use_variance: bool = True, use_bias: bool = True
) -> Tensor:
    """Return Ω = variance Z^-1 - ΔᵀΔ [d_in, d_in], symmetric. variance: tr D / N times its weight."""
    omega = fisher.Z_inv * variance if use_variance else torch.zeros_like(fisher.Z_inv)
    if use_bias:
        omega.addmm_(delta.mT, delta, alpha=-1)
    return (omega + omega.mT) / 2


def guidance_into(
    Z_inv: Tensor, delta: Tensor, *, variance: float, use_variance: bool = True, use_bias: bool = True
) -> Tensor:
    """Compute `guidance` in the memory of Z^-1; the result is symmetric up to rounding."""
    omega = Z_inv.mul_(variance) if use_variance else Z_inv.zero_()
    return omega.addmm_(delta.mT, delta, alpha=-1) if use_bias else omega


def two_sided(fisher: Fisher, delta: Tensor, rank: int, *, inverse_n: float) -> tuple[Tensor, Tensor]:
    """Return A [r, d_in] and B [d_out, r] that minimise the two-sided bound.

    They are improved alternately, beginning with the SVD of Δ. Each half step solves its eigenproblem
    exactly, so the bound never rises. fisher: with the full Y_inv [d_out, d_out].
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
    """Return (1/N) tr(A Z^-1 Aᵀ) tr(Bᵀ Y^-1 B) + ‖Δ‖² - ‖Bᵀ Δ Aᵀ‖² for orthonormal A and B."""
    variance = float((A @ fisher.Z_inv @ A.mT).trace()) * float((B.mT @ fisher.Y_inv @ B).trace())
    kept = float((B.mT @ delta @ A.mT).square().sum())
    return inverse_n * variance + float(delta.square().sum()) - kept


def damped_inverse(X: Tensor, damping: float, what: str) -> tuple[Tensor, Tensor | None]:
    """Return (X + λ I)^-1 of a moment X [n, n], and the directions [n, k] that its data lacks, or None.

    This is a Cholesky inverse. A moment of fewer than n tokens is singular, and the rounding of its sums
    makes some eigenvalues slightly negative. If they reach half of the damping, `eigen_inverse` takes over,
    which is five to six times the work. Raises `InvalidInput` for a matrix that is not finite, or whose
    negative eigenvalues are too large for rounding.
    """
    if not math.isfinite(sum(map(float, torch.aminmax(X)))):
        raise InvalidInput(f"{what} holds a value that is not finite", param="calibration")
    # All work happens in one copy of X, column-major as in LAPACK; for an 8B model it has 0.8 GB.
    inverse = X.mT.clone(memory_format=torch.contiguous_format).mT
    inverse.diagonal().add_(damping)
    info = torch.empty((), dtype=torch.int32, device=X.device)
    torch.linalg.cholesky_ex(inverse, out=(inverse, info))
    if int(info) == 0:
        torch.cholesky_inverse(inverse, out=inverse)
        if _largest_eigenvalue(inverse) * damping < 2:
            return inverse, None
    return eigen_inverse(X, damping, what)


def eigen_inverse(X: Tensor, damping: float, what: str) -> tuple[Tensor, Tensor | None]:
    """Compute `damped_inverse` from the eigenvalues of symmetric X, with 0 for those that are rounding.

    Rounding is at least as large as the most negative eigenvalue, so any eigenvalue up to that size may be
    rounding. Raises `InvalidInput` if that is more than n eps of the largest one, because X is then no
    moment.
    """
    values, Q = torch.linalg.eigh((X + X.mT) / 2)
    rounding, largest = max(0.0, -float(values[0])), float(values[-1])
    if rounding > len(X) * SUM_EPSILON * largest:
        raise InvalidInput(
            f"{what} has eigenvalues from {-rounding:g} to {largest:g}: it is no moment of any data",
            param="calibration",
        )
    num_unseen = int((values <= rounding).sum()) if rounding else 0
    values = values.clone()
    values[:num_unseen] = 0
    inverse = Q / (values + damping) @ Q.mT
    return inverse, Q[:, :num_unseen] if num_unseen else None


def _largest_eigenvalue(X: Tensor) -> float:
    """Estimate the largest eigenvalue of positive X [n, n] by power iteration; close if it stands out."""
    v = torch.randn(len(X), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(X)
    for _ in range(20):
        v = X @ torch.nn.functional.normalize(v, dim=0)
    return float(torch.linalg.vector_norm(v))
