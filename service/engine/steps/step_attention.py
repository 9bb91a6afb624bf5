"""The attention of a model's steps: the choice of an implementation, and what it reads of each step.

    torch     `PagedAttention`, the reference implementation, on any device
    triton    `TritonPagedAttention`, on CUDA

Both serve steps made from plans (`layout`) and steps over static tensors (`make_by_tiles`, `make_by_rows`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.attention.backend import AttentionChoice, AttentionKind, choose_attention
from service.engine.attention.paged import (
    PagedInputs,
    PagedLayout,
    TritonPagedAttention,
    decode_split_target,
    prefill_split_limits,
    queries_per_tile,
)
from service.engine.attention.query_tiles import wants_split
from service.engine.attention.reference import (
    AttentionLayout,
    AttentionStep,
    AttentionTile,
    PagedAttention,
    TiledLayout,
    TokenRows,
)
from service.engine.forward.forward_pass import ModelFacts
from service.engine.kv.block_tables import BlockTables
from service.engine.kv.blocks import NULL_BLOCK
from service.engine.kv.cache import PagedKV
from service.engine.scheduling.plan import Chunk
from service.engine.settings import EngineConfig
from tessera.errors import UnsupportedModel

logger = logging.getLogger(__name__)

#: Rows of the block tables beyond one per running request, for the self-check at start.
_SPARE_ROWS = 2


class StepAttention:
    """Makes the attention of steps over `kv`. num_positions: of the longest request."""

    def __init__(self, kv: PagedKV, facts: ModelFacts, config: EngineConfig, *, num_positions: int) -> None:
        device = kv.pages_of(0)[0].device
        choice = _choose(kv, facts, config)
        self.kind = choice.kind
        max_blocks = -(-num_positions // kv.block_size)
        #: The block tables of the running requests, on the device.
        self.block_tables = BlockTables(config.max_running + _SPARE_ROWS, max_blocks, device)
        self._kv = kv
        self._decode_target, self._prefill_limits = 0, (0, 0)
        #: Queries of a prefill tile; None for the reference implementation, which takes rows.
        self.queries_per_tile: int | None = None
        self.layout: AttentionLayout = TiledLayout()
        if self.kind == AttentionKind.TRITON:
            self._decode_target = decode_split_target(kv)
            self._prefill_limits = prefill_split_limits(kv)
            self.queries_per_tile = queries_per_tile(kv, facts.num_heads)
            self.layout = PagedLayout(self.block_tables, self.queries_per_tile)
        logger.info("attention runs on %s%s", self.kind, choice.reason and f": {choice.reason}")

    def can_split(self, chunks: Sequence[Chunk]) -> bool:
        """Whether it pays to split the contexts of a step over programs, see `query_tiles.wants_split`."""
        if self.queries_per_tile is None:
            return False
        size = self.queries_per_tile
        singles = [chunk.end for chunk in chunks if chunk.length == 1]
        if wants_split(singles, self._decode_target):
            return True
        long = [chunk for chunk in chunks if chunk.length > 1]
        ends = [min(first + size, c.end) for c in long for first in range(c.start, c.end, size)]
        target, part_tokens = self._prefill_limits
        return wants_split(ends, target, part_tokens=part_tokens)

    def make_by_tiles(
        self, rows: TokenRows, singles: Tensor, tiles: Tensor, *, can_split: bool
    ) -> AttentionStep:
        """Return the attention of a step over static tensors, as tiles on the rows of `block_tables`: singles
        [S, 4] of one query each, tiles [P, 4] of up to `queries_per_tile`. can_split: see `can_split`."""
        assert self.queries_per_tile is not None
        tables = self.block_tables.tables
        no_lengths = singles[:0, 2]
        inputs = PagedInputs(tables, no_lengths, 0, tiles, self.queries_per_tile, can_split, singles)
        return TritonPagedAttention(self._kv, inputs, rows.blocks, rows.offsets)

    def make_by_rows(self, rows: TokenRows, table_rows: Tensor) -> AttentionStep:
        """Return the same for the reference implementation, each token by itself. table_rows: int64 [T], rows
        of `block_tables`."""
        tables = self.block_tables.tables.index_select(0, table_rows)
        # Past its own blocks a row's table still holds blocks of others, and a NaN in these would pass any
        # mask. The null block holds zeros.
        first_positions = torch.arange(tables.shape[1], device=tables.device) * self._kv.block_size
        own_tables = torch.where(first_positions <= rows.positions[:, None], tables, NULL_BLOCK)
        tile = AttentionTile(0, own_tables.long(), rows.positions[:, None])
        return PagedAttention(self._kv, rows.blocks, rows.offsets, [tile])


def _choose(kv: PagedKV, facts: ModelFacts, config: EngineConfig) -> AttentionChoice:
    if not facts.attends_itself:
        return choose_attention(kv, facts.num_heads, facts.options, setting=config.attention)
    reason = "the model computes attention itself"
    if config.attention == "triton":
        raise UnsupportedModel(f"attention cannot run on Triton: {reason}", param="attention")
    return AttentionChoice(AttentionKind.TORCH, reason)
