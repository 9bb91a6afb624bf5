"""The layout of a step in static tensors: the sizes that it is padded to, and the integers that fill them.

    [4, num_rows]     ids, positions, rows of the block tables and slots of the tokens
    [num_singles, 4]  the query of each request that computes one token, as a tile (`query_tiles.py`)
    [num_tiles, 4]    the queries of the others
    [num_logit_rows]  rows of the batch whose logits are needed

There are few sizes, because each of them is a CUDA graph. Padding is zeros: tokens of slot 0 in the null row
of the block tables, which write no KV and see none; tiles without queries; logits of row 0. Knows no device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from service.engine.attention.query_tiles import query_tiles
from service.engine.kv.memory import Ints
from service.engine.scheduling.plan import Chunk, StepPlan

_Integers = TypeVar("_Integers", Ints, Tensor)

#: Sizes of steps that only decode, as pairs (up to this many rows, in steps of this many): 24 sizes up to 256
#: rows.
_DECODE_STEPS = ((4, 1), (64, 8), (256, 16), (1 << 30, 32))
#: The same for other steps: 33 sizes up to the largest. Up to about 200 tokens a step of 8B on an H200 mostly
#: reads weights, and padding is nearly free. Above, every row costs the same, and padding adds 4 % on average
#: and 14 % at most.
_MIXED_STEPS = ((16, 16), (512, 32), (1024, 64), (1 << 30, 128))
#: The largest step over static tensors. Above, the device takes longer than a host that launches op by op (8B
#: on an H200: 33 TFLOP at 2,048 tokens, 45 ms at 0.7 PFLOP/s, against 20 to 40 ms), and each further size
#: takes memory.
MAX_ROWS = 2048


@dataclass(frozen=True)
class StepShape:
    """The properties on which a computation over static tensors depends, besides their values."""

    num_rows: int
    num_singles: int = 0
    num_tiles: int = 0
    #: 0 if the logits of every row are needed.
    num_logit_rows: int = 0
    #: See `StepAttention.can_split`.
    can_split: bool = False

    @property
    def num_integers(self) -> int:
        return 4 * (self.num_rows + self.num_singles + self.num_tiles) + self.num_logit_rows

    @property
    def is_mixed(self) -> bool:
        """Whether it is for steps that do more than decode."""
        return self.num_logit_rows > 0


@dataclass(frozen=True)
class ShapeLimits:
    """The limits of one step, and the shapes that follow from them."""

    max_sequences: int
    max_tokens: int
    #: None if attention takes rows and no tiles.
    queries_per_tile: int | None

    @property
    def max_mixed(self) -> int:
        """Tokens of the largest step with a shape that does more than decode."""
        return min(self.max_tokens, MAX_ROWS)

    def decode_shape(self, num_sequences: int, *, can_split: bool) -> StepShape:
        """Return the smallest shape for steps of `num_sequences` tokens that all sample."""
        rows = _padded(num_sequences, _DECODE_STEPS, self.max_sequences)
        return StepShape(rows, 0 if self.queries_per_tile is None else rows, can_split=can_split)

    def mixed_shape(self, num_tokens: int, *, can_split: bool) -> StepShape:
        """Return the smallest shape for any step of `num_tokens` tokens, up to `max_mixed`.

        There are always enough tiles: a tile that is not full is the last of its chunk, and a chunk that is
        not a single has two tokens or more.
        """
        assert num_tokens <= self.max_mixed
        rows = _padded(num_tokens, _MIXED_STEPS, self.max_mixed)
        sequences = min(self.max_sequences, rows)
        if self.queries_per_tile is None:
            return StepShape(rows, num_logit_rows=sequences, can_split=can_split)
        tiles = rows // self.queries_per_tile + min(self.max_sequences, rows // 2)
        return StepShape(rows, sequences, tiles, sequences, can_split)

    def shapes(self) -> Iterator[StepShape]:
        """Yield all shapes, large ones first."""
        for count in sorted(_sizes(_MIXED_STEPS, self.max_mixed), reverse=True):
            yield from (self.mixed_shape(count, can_split=can_split) for can_split in (True, False))
        for count in sorted(_sizes(_DECODE_STEPS, self.max_sequences), reverse=True):
            yield from (self.decode_shape(count, can_split=can_split) for can_split in (True, False))


def pieces(integers: _Integers, shape: StepShape) -> tuple[_Integers, _Integers, _Integers, _Integers]:
    """Views of the parts of `integers` [shape.num_integers]: rows, singles, tiles, logit rows."""
    singles = 4 * shape.num_rows
    tiles = singles + 4 * shape.num_singles
    logit_rows = tiles + 4 * shape.num_tiles
    return (
        integers[:singles].reshape(4, -1),
        integers[singles:tiles].reshape(-1, 4),
        integers[tiles:logit_rows].reshape(-1, 4),
        integers[logit_rows:],
    )


def lay_out(
    plan: StepPlan, table_rows: Sequence[int], shape: StepShape, queries_per_tile: int | None
) -> Ints:
    """Return the integers of a step, int64 [shape.num_integers]. table_rows: the row of each chunk in the
    block tables."""
    values = np.zeros(shape.num_integers, np.int64)
    rows, singles, tiles, logit_rows = pieces(values, shape)
    chunks = plan.chunks
    if not shape.is_mixed:
        count = len(chunks)
        rows[0, :count] = [chunk.request.token_ids[chunk.start] for chunk in chunks]
        rows[1, :count] = [chunk.start for chunk in chunks]
        rows[2, :count] = table_rows
        rows[3, :count] = [chunk.request.slot for chunk in chunks]
        if queries_per_tile is not None:
            _fill_singles(singles[:count], rows)
        return values
    lengths = np.asarray([chunk.length for chunk in chunks])
    first_rows = np.cumsum(lengths) - lengths
    count = int((lengths == 1).sum())
    _fill_rows(rows, chunks, table_rows, lengths, first_rows)
    if queries_per_tile is not None:
        _fill_singles(singles[:count], rows)
        long = chunks[count:]
        own = query_tiles(
            first_rows[count:].tolist(),
            [chunk.start for chunk in long],
            [chunk.length for chunk in long],
            first_sequence=count,
            queries_per_tile=queries_per_tile,
        )
        own[:, 3] = np.asarray(table_rows)[own[:, 3]]
        tiles[: len(own)] = own
    sampling = [index for index, chunk in enumerate(chunks) if chunk.samples]
    logit_rows[: len(sampling)] = (first_rows + lengths - 1)[sampling]
    return values


def _fill_rows(
    rows: Ints, chunks: Sequence[Chunk], table_rows: Sequence[int], lengths: Ints, first_rows: Ints
) -> None:
    """Fill in the id, position, row of the block tables and slot of every token. lengths, first_rows: of the
    chunks."""
    num_tokens = int(lengths.sum())
    starts = np.asarray([chunk.start for chunk in chunks])
    slots = [chunk.request.slot for chunk in chunks]
    token_ids = (chunk.request.token_ids[chunk.start : chunk.end] for chunk in chunks)
    rows[0, :num_tokens] = list(itertools.chain.from_iterable(token_ids))
    rows[1, :num_tokens] = np.arange(num_tokens) + np.repeat(starts - first_rows, lengths)
    rows[2:, :num_tokens] = np.repeat([table_rows, slots], lengths, axis=1)


def _fill_singles(singles: Ints, rows: Ints) -> None:
    """Fill in tiles of one query each, for as many rows as there are singles."""
    count = len(singles)
    singles[:, 0] = np.arange(count)
    singles[:, 1] = 1
    singles[:, 2:] = rows[1:3, :count].T


def _padded(count: int, steps: Sequence[tuple[int, int]], largest: int) -> int:
    step = next(step for limit, step in steps if count <= limit)
    return min(-(-count // step) * step, largest)


def _sizes(steps: Sequence[tuple[int, int]], largest: int) -> set[int]:
    return {_padded(count, steps, largest) for count in range(1, largest + 1)}
