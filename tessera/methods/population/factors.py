"""A and B of all target modules while they are learned, inside the layers of the frozen base model.

    y = W x + B (R_k (A x))        k: the slot whose row x is in

All users share A and B, so their gradients are sums over the rows of all users. Every few steps, A and B are
made orthonormal again, and the cores absorb the difference, so that no user's delta changes:

    A Aᵀ = L Lᵀ,   A ← L^-1 A,   R ← R L          Bᵀ B = L Lᵀ,   B ← B L^-ᵀ,   R ← Lᵀ R

Cholesky serves better than QR here: one batched [2 M, r, r] decomposition for all modules replaces 2 M tall
ones, and between two retractions the vectors stay nearly orthonormal. This file knows neither users nor
losses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.errors import InvalidInput
from tessera.formats.manifest import ModuleShape
from tessera.methods.building.targets import Target
from tessera.model.target_modules import by_sequence

#: The gradients of A and B are sums over few users and therefore noisy, so the second moment needs a longer
#: memory than 0.9.
BETAS = (0.9, 0.99)


class SharedFactors:
    """A[i] [r, d_in] and B[i] [d_out, r], which are leaves, and core [M, K, r, r], the served R of K users.

    All are float32, or float64 for a model of that dtype.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        factors: Sequence[tuple[Tensor, Tensor]],
        *,
        num_slots: int,
        learns: bool = True,
    ) -> None:
        """factors: orthonormal (A, B) of each target, on any device. learns: whether they get gradients."""
        weight, rank = targets[0].weight, len(factors[0][0])
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._targets = targets
        self.A = [A.to(weight.device, self.dtype) for A, _ in factors]
        self.B = [B.to(weight.device, self.dtype) for _, B in factors]
        if learns:
            self.A = [A.clone().requires_grad_() for A in self.A]
            self.B = [B.clone().requires_grad_() for B in self.B]
        self.core = torch.zeros(len(targets), num_slots, rank, rank, dtype=self.dtype, device=weight.device)
        self.core_grad = torch.zeros_like(self.core)
        self._rows = torch.zeros(0, dtype=torch.int64, device=weight.device)
        self._length: int | None = None
        self._leaves = [self._leaf(index) for index in range(len(targets))]
        by_width: dict[int, list[Tensor]] = defaultdict(list)
        for X in (*self.A, *self.B):
            by_width[max(X.shape)].append(X)
        groups = [{"params": members, "lr": 0.0, "width": width} for width, members in by_width.items()]
        self._optimiser = torch.optim.Adam(groups, betas=BETAS, eps=1e-12)

    @property
    def device(self) -> torch.device:
        return self.core.device

    def tensors(self) -> dict[ModuleShape, tuple[Tensor, Tensor]]:
        """Return copies of the present (A, B) of each module."""
        return {
            target.shape: (A.detach().clone(), B.detach().clone())
            for target, A, B in zip(self._targets, self.A, self.B, strict=True)
        }

    def frozen(self, *, num_slots: int) -> SharedFactors:
        """Return a view of A and B for other users, which follows their changes and gives no gradients."""
        pairs = [(A.detach(), B.detach()) for A, B in zip(self.A, self.B, strict=True)]
        return SharedFactors(self._targets, pairs, num_slots=num_slots, learns=False)

    def own_rows(self, rows: Tensor, length: int) -> None:
        """Set the slot of each row of the next batch, int64 [S], and the length of its rows in tokens."""
        self._rows, self._length = rows, length

    def zero_grad(self) -> None:
        self.core_grad.zero_()
        self._optimiser.zero_grad(set_to_none=True)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within this context the layers of the model, which are frozen, add A, B and each row's core."""
        linears = [target.linear for target in self._targets]
        hooks = [linear.register_forward_hook(_Hook(self, index)) for index, linear in enumerate(linears)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, rate: float) -> None:
        """Take one step of Adam on A and B that turns their vectors by at most about `rate` radians.

        A unit vector of d entries has entries of about 1/√d, and Adam moves each of them by its learning
        rate.
        """
        for group in self._optimiser.param_groups:
            group["lr"] = rate / math.sqrt(group["width"])
        self._optimiser.step()

    @torch.no_grad()
    def retract(self) -> tuple[Tensor, Tensor]:
        """Make A and B orthonormal, and return left, right [M, r, r]: left @ R @ right has R's delta.

        The work is done in float64, whatever precision is set for matrix products. Raises `InvalidInput` if
        the vectors of a factor are dependent or not finite.
        """
        M, leaves = len(self.A), (*self.A, *(B.mT for B in self.B))
        grams = torch.stack([X.double() @ X.double().mT for X in leaves])
        L, failed = torch.linalg.cholesky_ex(grams)
        if bool(failed.any()) or not bool(torch.isfinite(L).all()):
            raise InvalidInput("the vectors of a factor are dependent or not finite")
        identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        inverse = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
        for X, scale in zip(leaves, inverse, strict=True):
            X.copy_(scale @ X.double())
        return L[M:].mT.to(self.dtype), L[:M].to(self.dtype)

    def output(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Return y + B R A x for module `index`. Raises `UnsupportedModel`.

        x: [S, L, d_in], or another layout that `by_sequence` knows;  y: [..., d_out].
        """
        h = F.linear(
            by_sequence(x, len(self._rows), self._length, self._targets[index].name),
            self.A[index].to(x.dtype),
        )
        core = self._leaves[index].index_select(0, self._rows).to(x.dtype)  # [S, r, r]
        return y + F.linear(torch.bmm(h, core.mT), self.B[index].to(x.dtype)).view(y.shape)

    def _leaf(self, index: int) -> Tensor:
        """Return the cores of one module [K, r, r], as a leaf with its gradient in `core_grad`."""
        leaf = self.core[index].requires_grad_()
        leaf.grad = self.core_grad[index]
        return leaf


class _Hook:
    """A forward hook of one target module."""

    def __init__(self, factors: SharedFactors, index: int) -> None:
        self.factors, self.index = factors, index

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.factors.output(self.index, inputs[0], output)
