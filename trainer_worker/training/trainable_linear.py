"""A frozen linear layer that learns one `r × r` matrix per user, for many users in one batch.

    forward    h = A x          y = W x + B (R_u h)                 u: the user that row belongs to
    backward   q = Bᵀ dy        dR_u = Σ_t q hᵀ                     dx = Wᵀ dy + Aᵀ (R_uᵀ q)

For the backward pass the delta keeps only h, r numbers per token: W, A and B are frozen, so x is not needed.
The products with W, A and B are the same for all users; only the product with R depends on the user.

Knows nothing of optimizers, losses or preconditioners: R here is the core as it is served.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tessera.model.base_model import replace_module
from tessera.model.target_modules import by_sequence


class RowRankDelta(torch.autograd.Function):
    """z[s, l] = R[rows[s]] @ h[s, l]

    h: [S, L, r];  R: [K, r, r], same dtype;  rows: int64 [S] in 0..K-1;  returns [S, L, r]. Every row is one
    sequence of one user.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, R: Tensor, rows: Tensor) -> Tensor:
        per_row = R.index_select(0, rows)  # [S, r, r]
        ctx.save_for_backward(h, per_row, rows)
        ctx.num_users = R.shape[0]
        return torch.bmm(h, per_row.mT)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, q: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, per_row, rows = ctx.saved_tensors
        dh = torch.bmm(q, per_row) if ctx.needs_input_grad[0] else None
        dR = None
        if ctx.needs_input_grad[1]:
            dR = h.new_zeros(ctx.num_users, h.shape[-1], h.shape[-1])
            dR.index_add_(0, rows, torch.bmm(q.mT, h))
        return dh, dR, None


@dataclass
class RowOwners:
    """The owners of the rows that go through the model, shared by all layers of one pass."""

    #: int64 [S].
    rows: Tensor
    #: L, tokens of each row with padding. If it is None, layers must receive [S, L, d].
    length: int | None = None


@dataclass(frozen=True)
class Delta:
    """The term B R A x that is added to a layer's output."""

    #: [r, d_in], in the layer's dtype.
    A: Tensor
    #: [d_out, r], in the layer's dtype.
    B: Tensor
    #: [K, r, r].
    R: Tensor
    owners: RowOwners


class TrainableLinear(nn.Linear):
    """Replaces a linear layer and shares its weight. Without a delta it computes the same as that layer.

    It is a subclass of `nn.Linear` with the same parameter names, so that code which searches for target
    modules or reads the state dict finds what was there before.
    """

    def __init__(self, linear: nn.Linear, name: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name = name
        self.delta: Delta | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., d_out]. Raises `UnsupportedModel`.

        x: [S, L, d_in] with one sequence per row, or another shape that `by_sequence` knows.
        """
        y = F.linear(x, self.weight, self.bias)
        delta = self.delta
        if delta is None:
            return y
        owners = delta.owners
        rows = by_sequence(x, len(owners.rows), owners.length, self.name)
        h = F.linear(rows, delta.A).to(delta.R.dtype)
        z: Tensor = RowRankDelta.apply(h, delta.R, owners.rows)  # type: ignore[no-untyped-call]
        return y + F.linear(z.to(x.dtype), delta.B).view(y.shape)


def trainable_modules(model: nn.Module, names: Sequence[str]) -> list[TrainableLinear]:
    """Return the layers with these names as `TrainableLinear`, after replacing those that are not yet."""
    found = []
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, TrainableLinear):
            module = replace_module(model, name, functools.partial(TrainableLinear, name=name))
        assert isinstance(module, TrainableLinear)
        found.append(module)
    return found
