"""The attention of a model's steps: which implementation, and how each is told about a step.

    torch     `PagedAttention`, any device: the slow truth
    triton    `TritonPagedAttention`, CUDA

Both for steps made from plans (`layout`) and for decode steps over static tensors (`make_decode`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.attention import AttentionStep, AttentionTile, PagedAttention
from service.engine.attention_layout import AttentionLayout, PagedLayout, TiledLayout
from service.engine.batch import TokenRows
from service.engine.block_tables import BlockTables
from service.engine.blocks import NULL_BLOCK
from service.engine.config import EngineConfig
from service.engine.kv_cache import PagedKV
from service.engine.model_path import ModelFacts
from service.engine.paged_attention import (
    PagedInputs,
    TritonPagedAttention,
    decode_split_target,
    queries_per_tile,
)
from service.engine.paged_choice import AttentionKind, choose_attention
from service.engine.paged_work import wants_split

logger = logging.getLogger(__name__)

#: Rows of the block tables beside one per running sequence: those of the trial at start.
_SPARE_ROWS = 2


class StepAttention:
    """kv: where K and V are. num_positions: of the longest sequence. block_tables: of the sequences in
    flight, on the device."""

    def __init__(self, kv: PagedKV, facts: ModelFacts, config: EngineConfig, *, num_positions: int) -> None:
        device = kv.pages_of(0)[0].device
        choice = choose_attention(kv, facts.num_heads, facts.options, wanted=config.attention)
        self.kind = choice.kind
        max_blocks = -(-num_positions // kv.block_size)
        self.block_tables = BlockTables(config.max_running + _SPARE_ROWS, max_blocks, device)
        self._kv = kv
        self._split_target = 0
        self.layout: AttentionLayout = TiledLayout()
        if self.kind == AttentionKind.TRITON:
            self._split_target = decode_split_target(kv)
            self.layout = PagedLayout(self.block_tables, queries_per_tile(kv, facts.num_heads))
        logger.info("attention runs on %s%s", self.kind, choice.reason and f": {choice.reason}")

    def can_split(self, lengths: Sequence[int]) -> bool:
        """Whether splitting contexts of these lengths over programs pays, see `paged_work`."""
        return self.kind == AttentionKind.TRITON and wants_split(lengths, self._split_target)

    def make_decode(self, rows: TokenRows, tables: Tensor, *, can_split: bool) -> AttentionStep:
        """The attention of a step of one token per sequence, over tensors that stay where they are.

        rows: of b sequences, position -1 for padding. tables: int32 [b, max_blocks]. can_split: as above.
        """
        lengths = rows.positions + 1
        if self.kind == AttentionKind.TRITON:
            inputs = PagedInputs(tables, lengths, len(lengths), can_split=can_split)
            return TritonPagedAttention(self._kv, inputs, rows.blocks, rows.offsets)
        # What a row's table holds past its own blocks is left from others, whose NaN would pass any mask; the
        # null block holds zeros.
        first_positions = torch.arange(tables.shape[1], device=tables.device) * self._kv.block_size
        own_tables = torch.where(first_positions < lengths[:, None], tables, NULL_BLOCK)
        tile = AttentionTile(0, own_tables.long(), rows.positions.clamp(min=0)[:, None])
        return PagedAttention(self._kv, rows.blocks, rows.offsets, [tile])
