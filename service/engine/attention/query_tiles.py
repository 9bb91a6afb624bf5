"""What of a step's attention the host decides, from lengths alone. Knows neither tensors nor kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

#: With more than this many programs for every one that the device holds at once, contexts of about one length
#: balance themselves, and a second pass costs more than splitting brings.
_ENOUGH_ROUNDS = 4
#: A context is split if it is this many times what a program gets if all get the same, ...
_LONG = 1.5
#: ... and that is at least so many tokens.
_SHORTEST_PART_TOKENS = 64


def split_target(num_kv_heads: int, num_multiprocessors: int, programs_per_sm: int) -> int:
    """How many items fill the device: one program runs an item for one KV head."""
    return max(1, programs_per_sm * num_multiprocessors // num_kv_heads)


def few_programs(num_tiles: int, target: int) -> bool:
    """Whether tiles are so few for the device that some may have to be split, where nothing else is known."""
    return num_tiles < _ENOUGH_ROUNDS * target


def wants_split(
    lengths: Sequence[int] | Ints, target: int, *, part_tokens: int = _SHORTEST_PART_TOKENS
) -> bool:
    """Whether any context of a step is to be split. lengths: of the contexts, one for each tile, [N]; target:
    of `split_target`; part_tokens: the smallest part.

    Where none is, one pass does it all. Part of the key of a CUDA graph: whether the second pass is in it
    cannot depend on the lengths at replay.
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
    """Tiles of the chunks of a step that hold more than one token, the ones with most keys first.

    first_rows: rows of the chunks' first tokens in the batch; starts: their positions; lengths: tokens of the
    chunks; first_sequence: row of the first chunk in the block table, the others follow. Returns int64
    [tiles, 4]: first row, number of queries, position of the first, row in the block table.
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
