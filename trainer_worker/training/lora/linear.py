"""The terms that LoRA forms add to a frozen linear layer, for several runs in one batch.

    y = W x + s_k (B_k (A_k x) - B0_k (A0_k x))          k: the run that the row of x belongs to

They are added by a forward hook, so the model's modules are not replaced. Knows neither losses nor
optimizers.
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
from tessera.model.target_modules import by_sequence
from trainer_worker.training.trainable_linear import RowOwners


class RowLinear(torch.autograd.Function):
    """y[s, l] = X[rows[s]] @ x[s, l]

    x: [S, L, d];  X: [K, k, d], any dtype;  rows: int64 [S] in 0..K-1;  returns [S, L, k] in x.dtype. The
    backward pass gathers the matrices again, because storing them per row takes more than the activations.
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
    """`RowLinear`, or a single product if all rows have the same matrix."""
    if len(X) == 1:
        return F.linear(x, X[0].to(x.dtype))
    y: Tensor = RowLinear.apply(x, X, rows)  # type: ignore[no-untyped-call]
    return y


@dataclass
class BatchOwners(RowOwners):
    """Row owners for layers that may learn by a local rule."""

    #: The indices of each run's tokens in the flattened [S · L], without padding; None if no local rule
    #: learns from this pass.
    tokens: Sequence[Tensor] | None = None


@dataclass
class LoraDelta:
    """The forward hook of one layer."""

    #: Name of the layer, for error messages.
    name: str
    #: [K, r, d_in].
    A: Tensor
    #: [K, d_out, r].
    B: Tensor
    #: [K].
    scale: Tensor
    owners: BatchOwners
    #: Initial factors, shaped like A and B, zero for runs that do not subtract their initial product; None if
    #: no run does.
    A0: Tensor | None = None
    B0: Tensor | None = None
    #: One local rule per run if A is trained by them. Their changes take effect from the next pass on.
    rules: list[HebbianRule] = field(default_factory=list)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the runs' deltas to the output of the layer.

        Raises `UnsupportedModel` if the layer does not receive one sequence per row.
        """
        rows = self.owners.rows
        x = by_sequence(inputs[0], len(rows), self.owners.length, self.name)
        change = row_linear(row_linear(x, self.A, rows), self.B, rows)
        if self.A0 is not None and self.B0 is not None:
            change = change - row_linear(row_linear(x, self.A0, rows), self.B0, rows)
        if self.rules and self.owners.tokens is not None:
            self._learn(x.detach())
        return output + (change * self.scale.to(x.dtype)[rows][:, None, None]).view(output.shape)

    def _learn(self, x: Tensor) -> None:
        """LoLoRA, algorithm 1: after the forward pass has used the old A, A learns from the input."""
        assert self.owners.tokens is not None
        flat = x.flatten(0, 1)
        for rule, tokens in zip(self.rules, self.owners.tokens, strict=True):
            if len(tokens):
                rule.step(flat.index_select(0, tokens).float())
