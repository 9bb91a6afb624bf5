"""Singular and eigen decompositions with fixed signs and seeds: a matrix always gives the same factors.

A randomised SVD without oversampling is not good enough for a basis that many adapters share. On a 768 x 768
matrix, the chordal error of the subspace (at most 5.66) is 2.3 with q = r and 2 iterations, 1.07 with q = r
and 10, 0.17 with q = 2 r and 4, and 0.02 with q = 4 r and 4.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.formats.basis import canonical_signs

#: Up to this smaller side the SVD is exact by default if iteration does not converge. The time is well spent,
#: because a basis is built once and used by many.
MAX_EXACT_SIDE = 4096
#: Up to this smaller side the SVD is exact and in float64. Beyond it, leading triplets come from iteration:
#: at 4,096, LAPACK takes 78 s in float32 on two cores, and its leading space is off by 3e-4 (chordal, at
#: 2,048).
MAX_DOUBLE_SIDE = 2048
#: Subspace iteration: directions carried along per requested one, the maximal number of rounds, and the
#: residual |X v - σ u| / σ_1 at which it ends. The weights of the small model's first layer take 11 to 26
#: rounds at rank 16 and come within 1e-7 of the exact space.
CARRIED, MAX_ROUNDS, RESIDUAL = 8, 100, 1e-8
#: From this round on, iteration stops unless the recent pace leads to convergence in time; for a matrix of
#: noise it does not.
FIRST_FORECAST = 8
#: Up to this side all eigenvectors are computed, which costs no more than an exact SVD. Beyond it, LOBPCG
#: finds the requested ones; where eigenvalues cluster, it finds another space that is about as good.
MAX_EIGH_SIDE = 4096
#: Up to this side a spectral norm is the largest of all singular values; beyond it comes power iteration.
MAX_NORM_SIDE = 1024
#: The randomised SVD: directions per requested one, and power iterations.
OVERSAMPLING = 4
NUM_POWER_ITERATIONS = 4
#: Directions below this share of the largest singular value are rounding, because sums are in float32.
RANK_TOLERANCE = 1e-6

Kind = Literal["auto", "exact", "randomised"]


@dataclass(frozen=True)
class Decomposition:
    """The way in which singular vectors are computed.

    "auto" serves only for leading ones. It is exact up to `MAX_DOUBLE_SIDE`; beyond that it iterates
    (`leading_triplets`); if that does not converge, it is exact up to `MAX_EXACT_SIDE` and randomised beyond.
    """

    kind: Kind = "auto"
    #: Memory beside the matrix; None: no limit. If float64 does not fit, float32 is used, and if that does
    #: not fit either, "auto" is randomised.
    limit_bytes: int | None = None

    def svd(self, X: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [m, k], S [k] and Vh [k, n] of X [m, n], with canonical signs; k > rank if X allows it.

        They are float64, or float32 if X is large and iteration does not serve, or if float64 does not fit.
        The global random generator is left untouched.
        """
        side = min(X.shape)
        exact = self._exact_dtype(X)
        found = leading_triplets(X, rank, seed=seed) if self._iterates(X, rank) else None
        if found is not None:
            U, S, Vh = found
        elif exact is not None:
            U, S, Vh = torch.linalg.svd(X.to(exact), full_matrices=False)
        else:
            q = min(max(OVERSAMPLING * rank, rank + 16), side)
            with torch.random.fork_rng(devices=[X.device] if X.is_cuda else []):
                torch.manual_seed(seed)
                U, S, V = torch.svd_lowrank(X.float(), q=q, niter=NUM_POWER_ITERATIONS)
            Vh = V.mT
        U, Vh = canonical_signs(U, Vh)
        return U, S, Vh

    def _iterates(self, X: Tensor, rank: int) -> bool:
        """Return whether to try `leading_triplets`; it holds X in float64, and X V, Q, U and V twice."""
        if self.kind != "auto" or min(X.shape) <= MAX_DOUBLE_SIDE:
            return False
        num_bytes = 8 * (X.numel() + 4 * _num_carried(X, rank) * sum(X.shape))
        return self.limit_bytes is None or num_bytes <= self.limit_bytes

    def _exact_dtype(self, X: Tensor) -> torch.dtype | None:
        """Return the dtype of the exact decomposition, or None for the randomised one."""
        if self.kind == "randomised" or (self.kind == "auto" and min(X.shape) > MAX_EXACT_SIDE):
            return None
        precise = _precise_dtype(X)
        if self.limit_bytes is None or svd_bytes(X, precise) <= self.limit_bytes:
            return precise
        fits = svd_bytes(X, torch.float32) <= self.limit_bytes
        return torch.float32 if fits or self.kind == "exact" else None


def leading_triplets(X: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return U [m, q], S [q] and Vh [q, n] of X in float64, with q > rank; the first rank + 1 have converged.

    Returns None if they do not converge in `MAX_ROUNDS`, or are not going to. This is subspace iteration with
    Rayleigh-Ritz in each round (Halko, Martinsson and Tropp, arXiv 0909.4061, section 4.5). A round takes two
    products with q columns, while a full SVD takes min(m, n) of them.
    """
    X = X.double()
    count, q = rank + 1, _num_carried(X, rank)
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(X.shape[1], q, generator=generator, dtype=torch.float64).to(X.device)
    U, S = None, None
    residuals: list[float] = []
    for rounds_left in reversed(range(MAX_ROUNDS)):
        Y = X @ V
        if U is not None and S is not None:
            residuals.append(float((Y - U * S)[:, :count].norm(dim=0).max() / S[0].clamp_min(1e-300)))
            if residuals[-1] <= RESIDUAL:
                return U, S, V.mT
            if not _will_converge(residuals, rounds_left):
                return None
        Q, _ = torch.linalg.qr(Y)
        V, R = torch.linalg.qr(X.mT @ Q)  # X is nearly Q Rᵀ Vᵀ
        U, S, Zh = torch.linalg.svd(R.mT)
        U, V = Q @ U, V @ Zh.mT
    return None


def _num_carried(X: Tensor, rank: int) -> int:
    return int(min(max(CARRIED * (rank + 1), rank + 33), *X.shape))


def _will_converge(residuals: list[float], rounds_left: int) -> bool:
    """Return whether the residuals, at the pace of their last half, fall below `RESIDUAL` in time."""
    if len(residuals) < FIRST_FORECAST:
        return True
    half = len(residuals) // 2
    pace = (residuals[-1] / residuals[-1 - half]) ** (1 / half)
    return bool(residuals[-1] * pace**rounds_left <= RESIDUAL)


def svd_bytes(X: Tensor, dtype: torch.dtype) -> int:
    """Return the bytes of an exact SVD: X in this dtype, LAPACK's copy, U, Vh and a work space of 4 k²."""
    k = min(X.shape)
    copies = 1 if X.dtype == dtype else 2
    return dtype.itemsize * (copies * X.numel() + k * (X.shape[0] + X.shape[1]) + 4 * k * k)


def relative_gap(S: Tensor, rank: int) -> float:
    """Return (σ_r - σ_{r+1}) / σ_r, how reproducible the leading subspace is; 1 without σ_{r+1}."""
    if len(S) <= rank:
        return 1.0
    if float(S[rank - 1]) == 0:
        return 0.0
    return float((S[rank - 1] - S[rank]) / S[rank - 1])


def check_numerical_rank(S: Tensor, rank: int, what: str) -> None:
    """Raise `InvalidInput` if fewer than `rank` of the singular values S of `what` exceed rounding."""
    found = int((RANK_TOLERANCE * S[0] < S).sum()) if float(S[0]) > 0 else 0
    if found < rank:
        raise InvalidInput(
            f"{what} has rank {found}, but {rank} directions are needed: use a smaller rank "
            "(or more calibration data, if it was computed from them)",
            param="rank",
            code="rank_too_large",
        )


def canonical_columns(Q: Tensor) -> Tensor:
    """Flip each column of Q [n, k] so that its entry of largest magnitude is positive."""
    pivot = Q.abs().argmax(dim=0)
    signs = torch.sign(Q.gather(0, pivot[None])[0])
    signs[signs == 0] = 1
    return Q * signs


def orthonormal_columns(X: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of X [n, k], with canonical signs."""
    return canonical_columns(torch.linalg.qr(_precise(X))[0])


def random_orthonormal(num_rows: int, rank: int, generator: torch.Generator) -> Tensor:
    """Draw Q [num_rows, rank] with QᵀQ = I from the uniform distribution; float64 on the CPU."""
    return orthonormal_columns(torch.randn(num_rows, rank, generator=generator, dtype=torch.float64))


def smallest_eigenvectors(
    X: Tensor,
    rank: int,
    *,
    solver: str = "auto",
    num_iterations: int = 40,
    generator: torch.Generator | None = None,
    limit_bytes: int | None = None,
) -> Tensor:
    """Return Q [n, rank], orthonormal eigenvectors of symmetric X [n, n] for its smallest eigenvalues.

    solver: "eigh", "lobpcg" or "auto", which is LOBPCG beyond `MAX_EIGH_SIDE`. LOBPCG needs n >= 3 rank and
    draws its first vectors from `generator`. It ends after `num_iterations`, when it has not yet separated
    vectors of nearly equal eigenvalues but has found about as small ones. limit_bytes: memory beside X, which
    is then overwritten; "auto" uses LOBPCG if eigh does not fit.
    """
    n = len(X)
    fits = limit_bytes is None or eigh_bytes(X) <= limit_bytes
    if n < 3 * rank or solver == "eigh" or (solver == "auto" and n <= MAX_EIGH_SIDE and fits):
        return canonical_columns(_eigenvectors(X, overwrite=limit_bytes is not None)[:, :rank])
    first = random_orthonormal(n, rank, generator or torch.Generator().manual_seed(0))
    largest = max(map(abs, torch.stack(torch.aminmax(X)).tolist()))
    # The scale of X does not change its eigenvectors, but the solver's tolerance depends on it.
    X = X / largest if limit_bytes is None else X.div_(largest)
    Q = torch.lobpcg(X, k=rank, X=first.to(X), largest=False, niter=num_iterations)[1]
    return canonical_columns(Q)


def eigh_bytes(X: Tensor) -> int:
    """Return the bytes that `eigh` of X [n, n] needs: a work space of 2 n², and copies for another dtype."""
    dtype = _precise_dtype(X)
    return dtype.itemsize * len(X) ** 2 * (2 if X.dtype == dtype else 4)


def _eigenvectors(X: Tensor, *, overwrite: bool) -> Tensor:
    """Return all eigenvectors of symmetric X [n, n] by ascending eigenvalue; `overwrite` reuses X."""
    if not overwrite or X.dtype != _precise_dtype(X):
        vectors: Tensor = torch.linalg.eigh(X.to(_precise_dtype(X)))[1]
        return vectors
    columns = X if X.stride(0) == 1 else X.mT  # column-major as in LAPACK, so nothing is copied
    torch.linalg.eigh(columns, out=(columns.new_empty(len(columns)), columns))
    return columns


def spectral_norm(X: Tensor) -> float:
    """Return the largest singular value of X [m, n], by power iteration beyond `MAX_NORM_SIDE`."""
    if min(X.shape) <= MAX_NORM_SIDE:
        return float(torch.linalg.matrix_norm(_precise(X), ord=2))
    v = torch.randn(X.shape[1], generator=torch.Generator().manual_seed(0)).to(X)
    for _ in range(64):
        v = torch.nn.functional.normalize(X.mT @ (X @ v), dim=0)
    return float(torch.linalg.vector_norm(X @ v))


def module_seed(seed: int, method: str, name: str, rank: int) -> int:
    """Return a seed that differs by module and method and is the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{method}/{name}/{rank}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _precise(X: Tensor) -> Tensor:
    return X.to(_precise_dtype(X))


def _precise_dtype(X: Tensor) -> torch.dtype:
    return torch.float64 if min(X.shape) <= MAX_DOUBLE_SIDE else torch.float32
