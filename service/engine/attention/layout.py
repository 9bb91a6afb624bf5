"""What attention reads of a step, for each of its implementations: integers to upload, and what is made of
them.

tiled    plain torch, any device: sequences that attend together, with their block tables
paged    Triton: block tables that stay on the device, lengths, tiles of queries
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from service.engine.attention.query_tiles import query_tiles
from service.engine.attention.reference import (
    AttentionStep,
    AttentionTile,
    MakeStep,
    PagedAttention,
    TokenRows,
)
from service.engine.kv.block_tables import BlockTables
from service.engine.kv.blocks import NULL_BLOCK
from service.engine.kv.cache import PagedKV
from service.engine.kv.memory import Ints
from service.engine.scheduling.plan import Chunk

#: Tables up to this many blocks are not split for the sake of shorter sequences among them.
_SMALL_TABLE = 8


class AttentionLayout(Protocol):
    """How one implementation of attention is told about a step."""

    def lay_out(self, chunks: Sequence[Chunk], block_size: int) -> tuple[list[Ints], MakeStep]:
        """The integers to upload, and what makes the attention of them."""
        ...


@dataclass(frozen=True)
class TiledLayout:
    """For `PagedAttention`. Bounds the memory of a tile. keys: gathered at once; 64 Ki tokens are 256 MB of K
    and V at 8B geometry in bfloat16. scores: queries × keys of one head; 2 Mi are 256 MB at 32 heads in
    float32."""

    keys: int = 64 * 1024
    scores: int = 2 * 1024 * 1024

    def lay_out(self, chunks: Sequence[Chunk], block_size: int) -> tuple[list[Ints], MakeStep]:
        tiles = list(self._tiles(chunks, block_size))

        def make(kv: PagedKV, rows: TokenRows, pieces: list[Tensor]) -> AttentionStep:
            pairs = zip(pieces[::2], pieces[1::2], strict=True)
            made = [
                AttentionTile(start, table, positions, lengths=(known[:, -1] + 1).tolist())
                for (start, _, known), (table, positions) in zip(tiles, pairs, strict=True)
            ]
            return PagedAttention(kv, rows.blocks, rows.offsets, made)

        return [array for _, table, positions in tiles for array in (table, positions)], make

    def _tiles(self, chunks: Sequence[Chunk], block_size: int) -> Iterator[tuple[int, Ints, Ints]]:
        """First row, block table and positions of each tile."""
        starts = list(itertools.accumulate((chunk.length for chunk in chunks), initial=0))
        num_single = sum(chunk.length == 1 for chunk in chunks)
        tables = [chunk.request.blocks[: -(-chunk.end // block_size)] for chunk in chunks]
        for first, last in _groups([len(table) for table in tables[:num_single]], self.keys // block_size):
            padded = np.full((last - first, len(tables[first])), NULL_BLOCK, np.int64)
            for index, table in enumerate(tables[first:last]):
                padded[index, : len(table)] = table
            yield first, padded, np.asarray([[chunk.start] for chunk in chunks[first:last]], np.int64)
        for chunk, table, row in zip(
            chunks[num_single:], tables[num_single:], starts[num_single:-1], strict=True
        ):
            step = max(1, self.scores // (len(table) * block_size))
            for start in range(chunk.start, chunk.end, step):
                end = min(start + step, chunk.end)
                visible = np.asarray([table[: -(-end // block_size)]], np.int64)
                yield row + start - chunk.start, visible, np.arange(start, end, dtype=np.int64)[None]


class PagedLayout:
    """For `TritonPagedAttention`. queries_per_tile: as its configuration wants it."""

    def __init__(self, tables: BlockTables, queries_per_tile: int) -> None:
        self._tables = tables
        self._queries_per_tile = queries_per_tile

    def lay_out(self, chunks: Sequence[Chunk], block_size: int) -> tuple[list[Ints], MakeStep]:
        num_single = sum(chunk.length == 1 for chunk in chunks)
        starts = list(itertools.accumulate((chunk.length for chunk in chunks), initial=0))
        rows, entries = self._tables.plan([chunk.request.blocks for chunk in chunks])
        width = -(-max(chunk.end for chunk in chunks) // block_size)
        tiles = query_tiles(
            starts[num_single:-1],
            [chunk.start for chunk in chunks[num_single:]],
            [chunk.length for chunk in chunks[num_single:]],
            first_sequence=num_single,
            queries_per_tile=self._queries_per_tile,
        )
        lengths = np.asarray([chunk.end for chunk in chunks], np.int64)

        def make(kv: PagedKV, token_rows: TokenRows, pieces: list[Tensor]) -> AttentionStep:
            from service.engine.attention.paged import PagedInputs, TritonPagedAttention

            uploaded_rows, uploaded_entries, uploaded_lengths, uploaded_tiles = pieces
            self._tables.write(uploaded_entries)
            tables = self._tables.tables[:, :width].index_select(0, uploaded_rows)
            inputs = PagedInputs(tables, uploaded_lengths, num_single, uploaded_tiles, self._queries_per_tile)
            return TritonPagedAttention(kv, inputs, token_rows.blocks, token_rows.offsets)

        return [np.asarray(rows, np.int64), entries, lengths, tiles], make


def _groups(num_blocks: Sequence[int], max_blocks: int) -> Iterator[tuple[int, int]]:
    """Runs of sequences, given longest first, that attend in one tile: within its memory, and none of them
    less than half as long as the first, or most of what is gathered would be padding."""
    first = 0
    for index, count in enumerate(num_blocks):
        longest = num_blocks[first]
        is_too_short = longest > _SMALL_TABLE and 2 * count < longest
        if is_too_short or (index > first and (index + 1 - first) * longest > max_blocks):
            yield first, index
            first = index
    if num_blocks:
        yield first, len(num_blocks)
