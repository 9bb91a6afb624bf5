"""What LoRA forms add to a frozen linear layer, for several runs in one batch.

    y = W x + s_k (B_k (A_k x) - B0_k (A0_k x))          k: the run whose row x is in

Attached by a forward hook, so the model's modules stay what they were. Knows neither losses nor optimisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tessera.methods.building.hebbian import HebbianRule
from tessera.model.sequence_rows import by_sequence
from trainer_worker.training.trainable_linear import RowOwners


class RowLinear(torch.autograd.Function):
    """y[s, l] = X[rows[s]] @ x[s, l]

    x: [S, L, d];  X: [K, k, d], any dtype;  rows: int64 [S] in 0..K-1;  returns [S, L, k] in x.dtype. The
    matrices are gathered again for the backward pass: per row they would be larger than the activations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, X: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, X, rows)
        return torch.bmm(x, X.index_select(0, rows).to(x.dtype).mT)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, X, rows = ctx.saved_tensors
        dx = torch.bmm(dy, X.index_select(0, rows).to(dy.dtype)) if ctx.needs_input_grad[0] else None
        dX = None
        if ctx.needs_input_grad[1]:
            dX = torch.zeros_like(X, memory_format=torch.contiguous_format)
            dX.index_add_(0, rows, torch.bmm(dy.mT, x).to(X.dtype))
        return dx, dX, None


def row_linear(x: Tensor, X: Tensor, rows: Tensor) -> Tensor:
    """`RowLinear`, as one product where all rows have the same matrix."""
    if len(X) == 1:
        return F.linear(x, X[0].to(x.dtype))
    y: Tensor = RowLinear.apply(x, X, rows)  # type: ignore[no-untyped-call]
    return y


@dataclass
class BatchOwners(RowOwners):
    """The same, for layers that may learn by themselves."""

    #: For each run the indices of its tokens in the flattened [S · L], without padding, where local rules
    #: learn from this pass; else None.
    tokens: Sequence[Tensor] | None = None


@dataclass
class LoraDelta:
    """The forward hook of one layer. A: [K, r, d_in], B: [K, d_out, r], A0 and B0 alike, scale: [K].

    A0, B0: None if no run subtracts its initial product, zeros for the runs that do not. rules: one for each
    run, if A learns by local rules; what they learn is seen from the next pass on.
    """

    name: str
    A: Tensor
    B: Tensor
    scale: Tensor
    owners: BatchOwners
    A0: Tensor | None = None
    B0: Tensor | None = None
    rules: list[HebbianRule] = field(default_factory=list)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Raises `UnsupportedModel` if the layer does not read one sequence per row."""
        rows = self.owners.rows
        x = by_sequence(inputs[0], len(rows), self.owners.length, self.name)
        change = row_linear(row_linear(x, self.A, rows), self.B, rows)
        if self.A0 is not None and self.B0 is not None:
            change = change - row_linear(row_linear(x, self.A0, rows), self.B0, rows)
        if self.rules and self.owners.tokens is not None:
            self._learn(x.detach())
        return output + (change * self.scale.to(x.dtype)[rows][:, None, None]).view(output.shape)

    def _learn(self, x: Tensor) -> None:
        """LoLoRA, algorithm 1: the forward pass has used the old A, now A learns from the input."""
        assert self.owners.tokens is not None
        flat = x.flatten(0, 1)
        for rule, tokens in zip(self.rules, self.owners.tokens, strict=True):
            if len(tokens):
                rule.step(flat.index_select(0, tokens).float())
