"""Decoder layers of the Llama family without attention, bare and with adapters, on the same inputs.

    qkv GEMM, qkv_rope | o GEMM, add | gate_up GEMM, glu | down GEMM, add

The bare form has no A rows in its weights and no deltas in its ops; both forms are otherwise the same, so
that the ratio is what the adapters cost. Every layer has weights of its own: nothing stays in the cache that
would not in a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.forward.layers import allocate_together
from service.engine.kernels import (
    GroupDelta,
    GroupFactors,
    Norm,
    QKVShape,
    RowSquares,
    StepRows,
    ops_for,
    stack_factors,
)
from tests.popularity import make_token_slots

#: Target modules of a layer: q, k, v, o, gate, up, down.
NUM_MODULES = 7
BLOCK_SIZE = 16
_SCALE = 0.02


@dataclass(frozen=True)
class Geometry:
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @property
    def groups(self) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """Per GEMM: d_in, widths of its segments, their modules within a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, (q, kv, kv), (0, 1, 2)),
            "o": (q, (self.hidden,), (3,)),
            "gate_up": (self.hidden, (self.ff, self.ff), (4, 5)),
            "down": (self.ff, (self.hidden,), (6,)),
        }


GEOMETRIES = {
    "8b": Geometry(4096, 14336, 32, 8, 128, 16),
    "1b": Geometry(2048, 8192, 32, 8, 64, 16),
    "small": Geometry(128, 320, 4, 2, 32, 2),
}


def fuse_layer(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The weights of a layer's groups, where the engine would put them. parts: of each, the rows it has."""
    shapes = [(sum(map(len, rows)), rows[0].shape[1]) for rows in parts.values()]
    weights = dict(zip(parts, allocate_together(shapes, like=parts["qkv"][0]), strict=True))
    for name, rows in parts.items():
        torch.cat(rows, out=weights[name])
    return weights


class Weights:
    """Random weights of all layers. W: per layer and group [N, d_in]."""

    def __init__(self, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        self.geometry, self.device, self.dtype = geometry, device, dtype
        self.W = [
            fuse_layer(
                {
                    name: [self.random(sum(widths), d_in)]
                    for name, (d_in, widths, _) in geometry.groups.items()
                }
            )
            for _ in range(geometry.layers)
        ]
        self.norm = Norm(torch.ones(geometry.hidden, device=device, dtype=dtype), 1e-5)

    def random(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype).normal_(std=_SCALE)


class Adapters:
    """One basis of the given rank and R for `num_slots` adapters.

    WA: per layer and group, W with the group's A rows below. factors: the same, what its delta needs.
    """

    def __init__(self, weights: Weights, rank: int, num_slots: int) -> None:
        geometry = weights.geometry
        self.rank = rank
        self.R_slots = weights.random(num_slots + 1, geometry.layers * NUM_MODULES, rank, rank)
        self.R_slots[0] = 0
        self.WA: list[dict[str, Tensor]] = []
        self.factors: list[dict[str, GroupFactors]] = []
        for layer in range(geometry.layers):
            parts = {}
            self.factors.append({})
            for name, (d_in, widths, modules) in geometry.groups.items():
                A = weights.random(len(widths) * rank, d_in)
                W = weights.W[layer][name]
                parts[name] = [W, A]
                B = [weights.random(width, rank) for width in widths]
                numbers = [layer * NUM_MODULES + module for module in modules]
                self.factors[-1][name] = stack_factors(B, widths, numbers, self.R_slots)
            self.WA.append(fuse_layer(parts))


class Step:
    """The inputs of T tokens, and runs over all layers."""

    def __init__(self, weights: Weights, num_tokens: int) -> None:
        geometry, device = weights.geometry, weights.device
        self.weights, self.num_tokens = weights, num_tokens
        self.shape = QKVShape(geometry.heads, geometry.kv_heads, geometry.head_dim, geometry.head_dim)
        self._ops = ops_for(device)
        self.residual = weights.random(num_tokens, geometry.hidden)
        self.attended = weights.random(num_tokens, geometry.heads * geometry.head_dim)
        angles = torch.rand(num_tokens, geometry.head_dim, device=device)
        pages = (num_tokens + 1, geometry.kv_heads, BLOCK_SIZE, geometry.head_dim)
        K, V = (torch.zeros(pages, device=device, dtype=weights.dtype) for _ in "KV")
        blocks = torch.arange(1, num_tokens + 1, device=device)
        self.rows = StepRows(angles.cos(), angles.sin(), K, V, blocks, blocks % BLOCK_SIZE)

    def slots(self, popularity: str) -> Tensor:
        return make_token_slots(popularity, self.num_tokens).to(self.weights.device)

    def bare(self, *, puts_off: bool = True) -> Tensor:
        """The base model alone."""
        return self._run(self.weights.W, [{}] * self.weights.geometry.layers, puts_off)

    def adapted(self, adapters: Adapters, token_slots: Tensor, *, puts_off: bool = True) -> Tensor:
        """puts_off: norms are put off (`add_residual`), else each add holds a whole row (`add_rms_norm`)."""
        deltas = [
            {name: GroupDelta(factors, token_slots) for name, factors in layer.items()}
            for layer in adapters.factors
        ]
        return self._run(adapters.WA, deltas, puts_off)

    def appended(self, adapters: Adapters) -> Tensor:
        """A's rows in the weights, but no deltas: what the larger GEMMs cost by themselves."""
        return self._run(adapters.WA, [{}] * self.weights.geometry.layers, True)

    def _run(
        self, W: Sequence[dict[str, Tensor]], deltas: Sequence[dict[str, GroupDelta]], puts_off: bool
    ) -> Tensor:
        ff, norm = self.weights.geometry.ff, self.weights.norm
        residual = self.residual.clone()
        x, squares = self._ops.rms_norm(residual, norm), None
        for weight, delta in zip(W, deltas, strict=True):
            self._ops.qkv_rope(x @ weight["qkv"].T, self.shape, self.rows, delta.get("qkv"), squares)
            x, squares = self._add(self.attended @ weight["o"].T, residual, delta.get("o"), puts_off)
            y = x @ weight["gate_up"].T
            gated = self._ops.glu(y, ff, "silu", delta.get("gate_up"), squares=squares)
            x, squares = self._add(gated @ weight["down"].T, residual, delta.get("down"), puts_off)
        return residual

    def _add(
        self, y: Tensor, residual: Tensor, delta: GroupDelta | None, puts_off: bool
    ) -> tuple[Tensor, RowSquares | None]:
        norm = self.weights.norm
        if puts_off:
            return self._ops.add_residual(y, residual, norm, delta)
        return self._ops.add_rms_norm(y, residual, norm, delta), None
