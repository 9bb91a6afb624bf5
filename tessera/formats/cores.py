"""From the numbers that are trained for a user to the stored cores R, and back.

    free         R_m = P_out R'_m P_in                       R' [r, r] is trained: all methods but these two
    spanned      R_m = P_out (sum_i v_i P_mi) P_in           v [u] is trained for some modules: TinyLoRA
    orthogonal   R_m = P_out (diag(b) Q diag(a) - I) P_in    Q = (I + S)(I - S)^-1, S skew-symmetric: PSOFT

A basis says which one its adapters are trained in (`BasisManifest.core`). Whatever it is, what is served is
R: a serving process knows only `expand`. All zeros are the base model in each of them.

The trained numbers of one user always have three dimensions, so that optimizer, checkpoint and gradient norm
treat all of them alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

FREE, SPANNED, ORTHOGONAL = "free", "spanned", "orthogonal"
#: Most bytes of the fixed matrices P of a spanned core. Every process that trains in the basis or serves it
#: holds them in float64. With 64 numbers, those of an 8B model have 15 MB at rank 16.
MAX_PROJECTION_BYTES = 64 * 1024**2


class CoreParametrization(ABC):
    """How the trained numbers theta of one user become R [M, r, r]. Knows one basis, and no model."""

    #: Of one user's theta.
    shape: tuple[int, int, int]
    #: Whether theta has as many numbers as R, so that R is stored.
    is_free = False

    @abstractmethod
    def expand(self, theta: Tensor) -> Tensor:
        """Return the stored cores [..., M, r, r]. theta: [..., *shape]."""

    @abstractmethod
    def gradient(self, theta: Tensor, core_grad: Tensor) -> Tensor:
        """Return dL/dtheta [..., *shape]. core_grad: dL/dR, [..., M, r, r]."""

    @abstractmethod
    def solve(self, R: Tensor) -> Tensor:
        """Return theta [*shape] float64 with `expand(theta)` near R [M, r, r]; equal to it if possible."""

    def gain(self, scale: Tensor | None = None) -> float:
        """Return how large the step on R is for one of independent signs on theta: |dR|_F / r, on average.

        scale: a factor on the R of each module, [M].
        """
        sizes = self._step_sizes()
        return float((sizes if scale is None else sizes * scale).mean())

    @abstractmethod
    def _step_sizes(self) -> Tensor:
        """|dR_m|_F / r of each module for a step of independent signs, [M]."""

    def scale(self, theta: Tensor, scale: Tensor) -> Tensor | None:
        """Return theta' with `expand(theta')` = scale · `expand(theta)`, or None if there is none.

        theta: [*shape]; scale: [M].
        """
        return theta if bool((scale == 1).all()) else None

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Return the same map with its constants on a device, in a dtype."""

    def relative_loss(self, R: Tensor) -> float:
        """Return the share of |R|² that no theta of `solve` expresses."""
        R = R.double()
        total = float(R.square().sum())
        return 0.0 if total == 0 else float((self.expand(self.solve(R)) - R).square().sum()) / total


class FreeCores(CoreParametrization):
    """theta = R' [M, r, r]."""

    is_free = True

    def __init__(self, P_in: Tensor, P_out: Tensor) -> None:
        self.P_in, self.P_out = P_in, P_out
        self.shape = (P_in.shape[0], P_in.shape[1], P_in.shape[2])

    def expand(self, theta: Tensor) -> Tensor:
        return self.P_out @ theta @ self.P_in

    def gradient(self, theta: Tensor, core_grad: Tensor) -> Tensor:
        return self.P_out.mT @ core_grad @ self.P_in.mT

    def solve(self, R: Tensor) -> Tensor:
        halfway: Tensor = torch.linalg.solve(self.P_out.double(), R.double())
        solved: Tensor = torch.linalg.solve(self.P_in.double(), halfway, left=False)
        return solved

    def _step_sizes(self) -> Tensor:
        norms = torch.linalg.matrix_norm(self.P_out.float()) * torch.linalg.matrix_norm(self.P_in.float())
        sizes: Tensor = norms / self.shape[2]
        return sizes

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return type(self)(self.P_in.to(device, dtype), self.P_out.to(device, dtype))


class SpannedCores(CoreParametrization):
    """theta = v [1, G, u]: one vector for each group of modules.

    The gradient is that of the sum: dL/dv_gi = sum over the group's modules of <D_mi, dL/dR_m>.
    """

    def __init__(self, directions: Tensor, groups: Tensor) -> None:
        """directions: D_mi = P_out P_mi P_in, [M, u, r, r]. groups: the group of each module, int64 [M]."""
        self.directions, self.groups = directions, groups
        self.shape = (1, int(groups.max()) + 1, directions.shape[1])

    def expand(self, theta: Tensor) -> Tensor:
        v = theta[..., 0, :, :].index_select(-2, self.groups)  # [..., M, u]
        return torch.einsum("...mu,muij->...mij", v, self.directions)

    def gradient(self, theta: Tensor, core_grad: Tensor) -> Tensor:
        by_module = torch.einsum("...mij,muij->...mu", core_grad, self.directions)
        return torch.zeros_like(theta[..., 0, :, :]).index_add_(-2, self.groups, by_module).unsqueeze(-3)

    def solve(self, R: Tensor) -> Tensor:
        vectors = []
        for group in range(self.shape[1]):
            members = self.groups == group
            D = self.directions[members].double().movedim(1, 0).flatten(1)  # [u, members · r²]
            target = R.double()[members].flatten()
            vectors.append(torch.linalg.lstsq(D.mT, target[:, None], driver="gelsd").solution[:, 0])
        return torch.stack(vectors)[None]

    def _step_sizes(self) -> Tensor:
        return self.directions.double().square().sum((1, 2, 3)).sqrt() / self.directions.shape[2]

    def scale(self, theta: Tensor, scale: Tensor) -> Tensor | None:
        return theta * scale[0] if bool((scale == scale[0]).all()) else None

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return type(self)(self.directions.to(device, dtype), self.groups.to(device))


class OrthogonalCores(CoreParametrization):
    """theta = the upper triangle of S, then b - 1 and a - 1 where they are trained, [M, 1, n].

    Q = (I + S)(I - S)^-1 is Cayley's map, or the first `terms` terms of its Neumann series I + 2 S + 2 S² + …
    (the last one with the factor 1), as in PEFT (OFT v2). Q is orthogonal in the first case, and nearly so in
    the second.
    """

    def __init__(self, P_in: Tensor, P_out: Tensor, *, scales: Sequence[str], terms: int = 0) -> None:
        """scales: which of "b" (left of Q) and "a" (right of it) are trained. terms: 0 takes Cayley's map."""
        self.P_in, self.P_out, self.scales, self.terms = P_in, P_out, tuple(scales), terms
        M, r = P_in.shape[:2]
        self.shape = (M, 1, r * (r - 1) // 2 + r * len(self.scales))
        self._rows, self._columns = torch.triu_indices(r, r, 1, device=P_in.device)
        self._identity = torch.eye(r, dtype=P_in.dtype, device=P_in.device)

    def expand(self, theta: Tensor) -> Tensor:
        return self.P_out @ (self.scaled(theta) - self._identity) @ self.P_in

    def scaled(self, theta: Tensor) -> Tensor:
        """Return diag(b) Q diag(a), [..., M, r, r]."""
        numbers = theta[..., 0, :]
        num_skew, r = len(self._rows), len(self._identity)
        S = torch.zeros(*numbers.shape[:-1], r, r, dtype=theta.dtype, device=theta.device)
        S[..., self._rows, self._columns] = numbers[..., :num_skew]
        Q = self._orthogonal(S - S.mT)
        for place, name in enumerate(self.scales):
            first = num_skew + place * r
            scale = 1 + numbers[..., first : first + r]
            Q = scale[..., :, None] * Q if name == "b" else Q * scale[..., None, :]
        return Q

    def _orthogonal(self, S: Tensor) -> Tensor:
        identity = self._identity
        if self.terms == 0:
            solved: Tensor = torch.linalg.solve(identity - S, identity + S, left=False)
            return solved
        Q, power = identity, identity
        last = 3 if self.terms == 3 else self.terms - 1  # PEFT takes four terms for three
        for term in range(1, last + 1):
            power = power @ S
            Q = Q + (1 if term == last and term > 1 else 2) * power
        return Q

    def gradient(self, theta: Tensor, core_grad: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            [grad] = torch.autograd.grad(self.expand(leaf), leaf, core_grad)
        return grad

    def solve(self, R: Tensor) -> Tensor:
        """Invert `expand` by Cayley's map, so up to the last term of a Neumann series."""
        wide = self.to(self.P_in.device, torch.float64)
        halfway: Tensor = torch.linalg.solve(wide.P_out, R.double())
        scaled = torch.linalg.solve(wide.P_in, halfway, left=False) + wide._identity
        b, a = self._find_scales(scaled)
        U, _, Vh = torch.linalg.svd(scaled / b[:, :, None] / a[:, None, :])
        Q = U @ Vh  # the nearest orthogonal matrix
        Q = torch.where(torch.linalg.det(Q)[:, None, None] > 0, Q, wide._identity)  # S reaches rotations only
        S = torch.linalg.solve(Q + wide._identity, Q - wide._identity, left=False)
        by_name = {"b": b - 1, "a": a - 1}
        parts = [S[:, self._rows, self._columns], *(by_name[name] for name in self.scales)]
        return torch.cat(parts, -1)[:, None]

    def _find_scales(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Return b and a, both [M, r] and positive, such that diag(1/b) scaled diag(1/a) is orthogonal.

        Its rows are orthogonal if scaled diag(1/a²) scaledᵀ is diagonal, which is linear in 1/a². If several
        a do that, the one nearest to 1 is taken.
        """
        ones = torch.ones_like(scaled[..., 0])
        if not self.scales:
            return ones, ones
        if self.scales == ("b",):
            return torch.linalg.vector_norm(scaled, dim=2), ones
        if self.scales == ("a",):
            return ones, torch.linalg.vector_norm(scaled, dim=1)
        products = scaled[:, self._rows, :] * scaled[:, self._columns, :]  # [M, pairs of rows, r]
        _, sizes, Vh = torch.linalg.svd(products, full_matrices=True)
        null = torch.ones_like(ones, dtype=torch.bool)
        bound = 1e-9 * torch.linalg.vector_norm(products, dim=(1, 2), keepdim=True)[..., 0] + 1e-30
        null[:, : sizes.shape[1]] = sizes <= bound
        null[:, -1] = True
        kept = Vh * null[:, :, None]
        inverse = torch.einsum("mkr,mks,ms->mr", kept, kept, ones)
        inverse = torch.where((inverse > 1e-6).all(1, keepdim=True), inverse, ones)
        b = torch.einsum("mij,mj->mi", scaled.square(), inverse).sqrt()
        balance = (b.log().mean(1) + inverse.log().mean(1) / 2)[:, None] / 2  # the scale of b may go to a
        return b * torch.exp(-balance), torch.exp(balance) * inverse.rsqrt()

    def _step_sizes(self) -> Tensor:
        norms = torch.linalg.matrix_norm(self.P_out) * torch.linalg.matrix_norm(self.P_in)
        sizes: Tensor = 2 * norms / len(self._identity)  # dQ = 2 dS at S = 0
        return sizes

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        P_in, P_out = self.P_in.to(device, dtype), self.P_out.to(device, dtype)
        return type(self)(P_in, P_out, scales=self.scales, terms=self.terms)
