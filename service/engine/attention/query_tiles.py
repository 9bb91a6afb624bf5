"""The decisions about a step's attention that the host makes, from lengths alone: tiles, and whether to
split.

Knows neither tensors nor kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

#: With more than this many programs for each one that the device holds at once, contexts of about the same
#: length balance by themselves, and a second pass costs more than splitting gains.
_ENOUGH_ROUNDS = 4
#: A context is split if it is this many times the equal share of a program, ...
_LONG = 1.5
#: ... and has at least this many tokens.
_SHORTEST_PART_TOKENS = 64


def split_target(num_kv_heads: int, num_multiprocessors: int, programs_per_sm: int) -> int:
    """Return the number of items that fill the device. One program runs an item for one KV head."""
    return max(1, programs_per_sm * num_multiprocessors // num_kv_heads)


def few_programs(num_tiles: int, target: int) -> bool:
    """Whether there are so few tiles for the device that some may have to be split, if nothing else is
    known."""
    return num_tiles < _ENOUGH_ROUNDS * target


def wants_split(
    lengths: Sequence[int] | Ints, target: int, *, part_tokens: int = _SHORTEST_PART_TOKENS
) -> bool:
    """Whether any context of a step should be split; if none, one pass suffices.

    lengths: [N], of the context of each tile. target: from `split_target`. part_tokens: the smallest part.
    The result is part of the key of a CUDA graph, because the lengths at replay cannot decide whether the
    graph has a second pass.
    """
    contexts = np.asarray(lengths)
    if contexts.size == 0:
        return False
    share = max(float(contexts.sum()) / target, part_tokens)
    return bool(contexts.max() >= _LONG * share)


def query_tiles(
    first_rows: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    *,
    first_sequence: int,
    queries_per_tile: int,
) -> Ints:
    """Return the tiles of the chunks that hold more than one token, those with the most keys first.

    first_rows: the row of each chunk's first token in the batch. starts: the position of that token. lengths:
    the number of tokens of each chunk. first_sequence: the row of the first chunk in the block table; the
    others follow. Returns int64 [tiles, 4]: first row, number of queries, position of the first, row in the
    block table.
    """
    tiles = np.asarray(
        [
            (row + offset, min(queries_per_tile, length - offset), start + offset, first_sequence + index)
            for index, (row, start, length) in enumerate(zip(first_rows, starts, lengths, strict=True))
            for offset in range(0, length, queries_per_tile)
        ],
        np.int64,
    ).reshape(-1, 4)
    ends = tiles[:, 1] + tiles[:, 2]
    return tiles[np.argsort(-ends, kind="stable")]
