"""A step's attention to be timed: random K and V of enough layers that no cache holds them, and queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.attention.paged import PagedInputs, TritonPagedAttention
from service.engine.attention.query_tiles import query_tiles
from service.engine.attention.reference import AttentionOptions, AttentionStep, AttentionTile, PagedAttention
from service.engine.kernels.paged_configs import KernelConfig, Phase
from service.engine.kv.cache import KVShape, PagedKV

#: Bytes of K and V, all layers together: several times the L2 of a Hopper GPU (50 MB).
_ENOUGH_BYTES = 1024**3
_MAX_LAYERS = 128
#: Of the largest output of a query, in bfloat16.
_OUTPUT_TOLERANCE = 4e-2


@dataclass(frozen=True)
class Heads:
    """num_heads query heads, num_kv_heads heads of K and V, of `dim` each."""

    num_heads: int
    num_kv_heads: int
    dim: int


@dataclass(frozen=True)
class Workload:
    """`batch` sequences whose last `queries` tokens of `context` attend."""

    heads: Heads
    batch: int
    context: int
    queries: int
    dtype: torch.dtype
    device: torch.device
    block_size: int = 16

    @property
    def kv_bytes(self) -> int:
        """What one layer must read."""
        heads = self.heads
        return self.batch * self.context * heads.num_kv_heads * 2 * heads.dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of one layer: a multiplication and an addition each, for scores and for outputs."""
        before = self.context - self.queries
        pairs = self.queries * before + self.queries * (self.queries + 1) // 2
        return 4 * self.batch * self.heads.num_heads * self.heads.dim * pairs

    @property
    def num_layers(self) -> int:
        enough = _ENOUGH_BYTES if self.device.type == "cuda" else 0
        return max(1, min(_MAX_LAYERS, -(-enough // self.kv_bytes)))


class Layers:
    """K, V and queries of a workload, and the ways to attend."""

    def __init__(self, workload: Workload) -> None:
        w = self.workload = workload
        width = -(-w.context // w.block_size)
        shape = KVShape(w.heads.num_kv_heads, w.heads.dim, w.heads.dim)
        self.kv = PagedKV(
            [shape] * w.num_layers,
            num_blocks=w.batch * width,
            block_size=w.block_size,
            device=w.device,
            dtype=w.dtype,
        )
        for layer in range(w.num_layers):
            for page in self.kv.pages_of(layer):
                page[1:].normal_()
        order = torch.randperm(w.batch * width, device=w.device) + 1
        self.tables = order.view(w.batch, width).to(torch.int32)
        self.q = torch.randn(
            w.batch * w.queries, w.heads.num_heads, w.heads.dim, device=w.device, dtype=w.dtype
        )
        self.options = AttentionOptions(w.heads.dim**-0.5)

    def attend(self, step: AttentionStep) -> Tensor:
        """All layers, one after the other; returns the last one's output."""
        for layer in range(self.workload.num_layers):
            out = step.attend_cached(layer, self.q, self.options)
        return out

    def torch_step(self) -> PagedAttention:
        """The reference implementation: every sequence in a tile of its own, for the memory's sake."""
        w = self.workload
        positions = torch.arange(w.context - w.queries, w.context, device=w.device)[None]
        tiles = [
            AttentionTile(index * w.queries, self.tables[index : index + 1].long(), positions)
            for index in range(w.batch)
        ]
        nowhere = torch.empty(0, dtype=torch.int64, device=w.device)
        return PagedAttention(self.kv, nowhere, nowhere, tiles)

    def triton_step(
        self,
        *,
        queries_per_tile: int,
        can_split: bool | None = None,
        configs: Mapping[Phase, KernelConfig] | None = None,
    ) -> TritonPagedAttention:
        w = self.workload
        lengths = torch.full((w.batch,), w.context, dtype=torch.int32, device=w.device)
        if w.queries == 1:
            inputs = PagedInputs(self.tables, lengths, w.batch, can_split=can_split)
        else:
            tiles = query_tiles(
                range(0, w.batch * w.queries, w.queries),
                [w.context - w.queries] * w.batch,
                [w.queries] * w.batch,
                first_sequence=0,
                queries_per_tile=queries_per_tile,
            )
            tensor = torch.from_numpy(tiles).to(w.device)
            inputs = PagedInputs(self.tables, lengths, 0, tensor, queries_per_tile, can_split)
        return TritonPagedAttention(self.kv, inputs, configs=configs)

    def check(self, out: Tensor, rows: Sequence[int]) -> None:
        """Compare these sequences of the last layer's output with the reference implementation."""
        w = self.workload
        positions = torch.arange(w.context - w.queries, w.context, device=w.device)[None]
        nowhere = torch.empty(0, dtype=torch.int64, device=w.device)
        for index in rows:
            tile = AttentionTile(0, self.tables[index : index + 1].long(), positions)
            own = slice(index * w.queries, (index + 1) * w.queries)
            step = PagedAttention(self.kv, nowhere, nowhere, [tile])
            expected = step.attend_cached(w.num_layers - 1, self.q[own], self.options).float()
            sizes = expected.abs().flatten(1).amax(1)
            error = ((out[own].float() - expected).abs().flatten(1).amax(1) / sizes).max()
            assert error <= _OUTPUT_TOLERANCE, f"{w}: differs by {float(error):.3g} of its size"
