"""A and B of all target modules while they are learned, in the layers of the frozen base model.

    y = W x + B (R_k (A x))        k: whose row x is in

A and B are shared: their gradients are sums over the rows of all users. After every few steps they are brought
back to orthonormal form, and what that takes away goes into the cores, so that no user's delta changes:

    Aᵀ = Q L,   A ← Qᵀ,   R ← R Lᵀ          B = Q L,   B ← Q,   R ← L R

Knows neither users nor losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_core.bases.targets import Target
from adapter_core.basis import ModuleShape

#: Gradients of A and B are sums over few users, and noisy: a longer memory than 0.9 for the second moment only.
BETAS = (0.9, 0.99)


class SharedFactors:
    """A[i]: [r, d_in], B[i]: [d_out, r], float32 leaves; core: [M, K, r, r], the served R of K users at once."""

    def __init__(
        self, targets: Sequence[Target], factors: Sequence[tuple[Tensor, Tensor]], *, num_slots: int
    ) -> None:
        """factors: orthonormal (A, B) of each target, on any device."""
        device, rank = targets[0].weight.device, len(factors[0][0])
        self._targets = targets
        self.A = [A.to(device, torch.float32).clone().requires_grad_() for A, _ in factors]
        self.B = [B.to(device, torch.float32).clone().requires_grad_() for _, B in factors]
        self.core = torch.zeros(len(targets), num_slots, rank, rank, device=device)
        self.core_grad = torch.zeros_like(self.core)
        self._rows = torch.zeros(0, dtype=torch.int64, device=device)
        self._leaves = [self._leaf(index) for index in range(len(targets))]
        # A unit vector of d entries has entries of 1/√d: the rate is the angle that a step turns a vector by.
        groups = [{"params": [X], "lr": 0.0, "width": max(X.shape)} for X in (*self.A, *self.B)]
        self._optimiser = torch.optim.Adam(groups, betas=BETAS, eps=1e-12)

    @property
    def device(self) -> torch.device:
        return self.core.device

    def tensors(self) -> dict[ModuleShape, tuple[Tensor, Tensor]]:
        return {
            target.shape: (A.detach().clone(), B.detach().clone())
            for target, A, B in zip(self._targets, self.A, self.B, strict=True)
        }

    def own_rows(self, rows: Tensor) -> None:
        """rows: int64 [S], the slot that each row of the next batch belongs to."""
        self._rows = rows

    def zero_grad(self) -> None:
        self.core_grad.zero_()
        self._optimiser.zero_grad(set_to_none=True)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model with A, B and each row's core in its layers, which have no gradient of their own."""
        linears = [target.linear for target in self._targets]
        hooks = [linear.register_forward_hook(_Hook(self, index)) for index, linear in enumerate(linears)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, rate: float) -> None:
        """One step of Adam on A and B that turns their vectors by about `rate` radians at most."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate / math.sqrt(group["width"])
        self._optimiser.step()

    @torch.no_grad()
    def retract(self) -> tuple[Tensor, Tensor]:
        """Make A and B orthonormal again; left, right [M, r, r], so that left @ R @ right is the same delta."""
        lefts, rights = [], []
        for A, B in zip(self.A, self.B, strict=True):
            Q_A, L_A = _positive_qr(A.mT)
            Q_B, L_B = _positive_qr(B)
            A.copy_(Q_A.mT)
            B.copy_(Q_B)
            lefts.append(L_B)
            rights.append(L_A.mT)
        return torch.stack(lefts), torch.stack(rights)

    def output(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """y + B R A x for module `index`. x: [S, L, d_in]; y: [S, L, d_out]."""
        h = F.linear(x, self.A[index].to(x.dtype))
        core = self._leaves[index].index_select(0, self._rows).to(x.dtype)  # [S, r, r]
        return y + F.linear(torch.bmm(h, core.mT), self.B[index].to(x.dtype))

    def _leaf(self, index: int) -> Tensor:
        """The cores of one module, [K, r, r]: a leaf whose gradient is a part of `core_grad`."""
        leaf = self.core[index].requires_grad_()
        leaf.grad = self.core_grad[index]
        return leaf


class _Hook:
    """A forward hook of one target module."""

    def __init__(self, factors: SharedFactors, index: int) -> None:
        self.factors, self.index = factors, index

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.factors.output(self.index, inputs[0], output)


def _positive_qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """Q [n, r] and L [r, r] with a positive diagonal: unique, and close to the identity for small steps."""
    Q, L = torch.linalg.qr(X)
    signs = torch.where(torch.diagonal(L) < 0, -1.0, 1.0)
    return Q * signs, L * signs[:, None]
