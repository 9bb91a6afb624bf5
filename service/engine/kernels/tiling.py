"""Tile sizes of the kernels as data: the tile of each op by number of tokens, with the reason for each
number.

Knows no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Most numbers of R, [tokens, rank, rank], that a consumer gathers per warp: 32 registers per thread, which
#: is rank 16 in tiles of 16 tokens, or rank 64 in tiles of one. Rank 32 in tiles of 16 would take 128
#: registers and spill. Above the limit `core_kernel` applies R once per token, in a launch of its own.
MAX_GATHERED_NUMBERS = 1024

#: Consumers gather R themselves up to this many tokens. Each consumer program fetches the R of its tokens
#: again: at 256 tokens, r = 16 and 8B geometry this is 15 MB of L2 reads per layer for glu; at 2,048 tokens
#: it would be 117 MB.
MAX_GATHERED_TOKENS = 256

#: `add_rms_norm` with a delta takes one launch up to this many tokens and this rank (one row per program,
#: which reads all of B_T: 128 KB at N = 4096, r = 16). Above it takes two: tiles that share B between rows,
#: then the norm.
MAX_ROW_TOKENS, MAX_ROW_RANK = 64, 16

#: Up to this many tokens `core_kernel` takes one token per program, so that each R is fetched by a program of
#: its own. Above it takes tiles of 16 tokens, which in a prefill mostly have one slot and share its R.
MAX_SINGLE_CORE_TOKENS = 512

#: Most numbers of B, [columns, rank], that a program holds: in registers with few tokens (64 numbers per
#: thread at 2 warps; at rank 128 a tile of 128 columns took all 255 registers), in shared memory with more
#: (32 KB; gate and up hold two of them, and at rank 512 a tile of 128 columns would not fit).
MAX_B_NUMBERS, MAX_SHARED_B_NUMBERS = 4096, 16 * 1024

#: The limit of the last entry of a table.
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Tile:
    """The part of an op's output that one program computes."""

    #: Rows per program. From 16 on B is applied by tensor cores, below element by element.
    tokens: int
    #: Columns per program; `qkv_rope` takes a head instead.
    columns: int
    warps: int


#: Pairs for each op of (largest number of tokens, tile), in rising order; the last tile serves all above.
Table = dict[str, tuple[tuple[int, Tile], ...]]

#: Up to 512 tokens these are the fastest tiles on an H200 at 1, 32 and 256 tokens, rank 16, every token with
#: an adapter of its own (benchmarks.operators --tune). The one for glu at 256 tokens is too wide for R to fit
#: the registers, so that `core_kernel` runs first: 11.1 µs per layer, against 15.2 with R gathered by wide
#: tiles. Above 512 tokens the tiles follow from arithmetic and have not been tuned.
LOW_RANK_TILES: Table = {
    "qkv_rope": (  # columns: a head's
        (4, Tile(1, 0, 2)),
        (64, Tile(16, 0, 4)),
        (512, Tile(32, 0, 8)),
        (NO_LIMIT, Tile(32, 0, 4)),
    ),
    "glu": (
        (4, Tile(1, 128, 4)),
        (64, Tile(16, 256, 16)),
        (512, Tile(32, 64, 2)),
        (NO_LIMIT, Tile(32, 128, 8)),
    ),
    "add": (
        (4, Tile(1, 64, 2)),
        (64, Tile(16, 128, 8)),
        (512, Tile(16, 256, 8)),
        (NO_LIMIT, Tile(32, 128, 4)),
    ),
}

#: The same for rank 64, where R is applied beforehand and a program mostly reads B.
HIGH_RANK_TILES: Table = {
    "qkv_rope": (
        (4, Tile(1, 0, 4)),
        (64, Tile(32, 0, 8)),
        (NO_LIMIT, Tile(32, 0, 4)),
    ),
    "glu": (
        (4, Tile(1, 128, 4)),
        (64, Tile(16, 256, 16)),
        (512, Tile(64, 64, 4)),
        (NO_LIMIT, Tile(32, 128, 8)),
    ),
    "add": (
        (4, Tile(1, 64, 4)),
        (64, Tile(16, 128, 8)),
        (512, Tile(64, 64, 8)),
        (NO_LIMIT, Tile(32, 128, 4)),
    ),
}
MAX_LOW_RANK = 32

#: Pairs of (largest number of columns, warps) for a program that holds a whole row. With a delta it has twice
#: as many, up to 16, because it waits for the rows of B_T.
ROW_WARPS = ((1024, 4), (4096, 8), (NO_LIMIT, 16))


def tiles_for(rank: int) -> Table:
    return LOW_RANK_TILES if rank <= MAX_LOW_RANK else HIGH_RANK_TILES


def tile_of(op: str, num_tokens: int, *, rank: int = 0, itemsize: int = 2) -> Tile:
    """Return the tile of an op. itemsize: bytes per number of B.

    Tensor cores cannot round as float32 does, so float32 products hold their operands in registers and take
    smaller tiles. With few tokens, high ranks take fewer columns.
    """
    tile = next(tile for most, tile in tiles_for(rank)[op] if num_tokens <= most)
    if tile.tokens >= 16 and itemsize > 2:
        return Tile(16, min(tile.columns, 64 if rank <= 32 else 32), tile.warps)
    limit = MAX_B_NUMBERS if tile.tokens < 16 else MAX_SHARED_B_NUMBERS
    if tile.columns * rank > limit:
        return replace(tile, columns=max(16, limit // (1 << (rank - 1).bit_length())))
    return tile


def row_warps(width: int, *, has_delta: bool) -> int:
    warps = next(warps for limit, warps in ROW_WARPS if width <= limit)
    return min(16, 2 * warps) if has_delta else warps
