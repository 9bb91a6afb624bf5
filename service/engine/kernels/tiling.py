"""Tile sizes of the kernels as data: which tile an op takes for how many tokens, and what each number rests
on.

Knows no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Numbers of R, [tokens, rank, rank], that a consumer gathers per warp, 32 registers a thread: rank 16
#: in tiles of 16 tokens, rank 64 in tiles of one. Rank 32 in tiles of 16 would be 128 and spill. Above,
#: `core_kernel` applies R once per token, in a launch of its own.
MAX_GATHERED_NUMBERS = 1024

#: R is gathered inside the consumers up to so many tokens. Each consumer program fetches its tokens' R again:
#: at 256 tokens, r = 16 and 8B geometry 15 MB of L2 reads a layer for glu, at 2,048 it would be 117 MB.
MAX_GATHERED_TOKENS = 256

#: `add_rms_norm` with a delta is one launch up to so many tokens (one row per program, all of B_T per row:
#: 128 KB at N = 4096, r = 16), two above and for higher ranks: tiles that share B between rows, the norm.
MAX_ROW_TOKENS, MAX_ROW_RANK = 64, 16

#: `core_kernel` takes one token per program up to here, so that every R is fetched by a program of its own;
#: above, tiles of 16 tokens, which in a prefill mostly have one slot and share its R.
MAX_SINGLE_CORE_TOKENS = 512

#: [columns, rank] of B that a program holds in registers with few tokens (64 numbers a thread at 2 warps; at
#: rank 128 a tile of 128 columns took all 255 registers), and in shared memory with more (32 KB; gate and up
#: hold two of them, and at rank 512 a tile of 128 columns would not fit).
MAX_B_NUMBERS, MAX_SHARED_B_NUMBERS = 4096, 16 * 1024

#: Of a table's last entry.
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Tile:
    """tokens: rows per program; from 16 on B is applied by tensor cores, below element by element."""

    tokens: int
    columns: int
    warps: int


#: Per op: (largest number of tokens, tile), in rising order; the last one serves all above.
Table = dict[str, tuple[tuple[int, Tile], ...]]

#: Up to 512 tokens the fastest on an H200 at 1, 32 and 256 tokens, rank 16, every token its own adapter
#: (benchmarks.operators --tune); for glu at 256 tokens it is one whose R does not fit the registers, so that
#: `core_kernel` runs first: 11.1 µs a layer against 15.2 with R gathered by wide tiles. Above it is reasoned,
#: not tuned.
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

#: The same for rank 64, where R is applied before and B is what a program reads most of.
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

#: Warps of a program that holds a whole row of so many columns; with a delta twice as many, up to 16, because
#: the rows of B_T are what it waits for.
ROW_WARPS = ((1024, 4), (4096, 8), (NO_LIMIT, 16))


def tiles_for(rank: int) -> Table:
    return LOW_RANK_TILES if rank <= MAX_LOW_RANK else HIGH_RANK_TILES


def tile_of(op: str, num_tokens: int, *, rank: int = 0, itemsize: int = 2) -> Tile:
    """itemsize: bytes of a number of B. No tensor core rounds as float32 does: its products hold operands in
    registers, so its tiles are smaller. With few tokens high ranks take fewer columns."""
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
