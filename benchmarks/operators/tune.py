"""The fastest tile of every op for each rank and number of tokens: a table to put into `gpu/tiling.py`.

Every candidate is timed in the op alone, over all layers, with every token its own adapter. CUDA only.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.device_time import time_on_device
from benchmarks.operators.single import single_ops
from benchmarks.operators.stack import Adapters, Step
from service.engine.kernels import tiling
from service.engine.kernels.tiling import Tile

#: Columns and warps; a head's columns are given.
CANDIDATES = {
    "qkv_rope": list(itertools.product((0,), (1, 2, 4, 8))),
    "glu": list(itertools.product((64, 128, 256, 512), (2, 4, 8, 16))),
    "add": list(itertools.product((32, 64, 128, 256), (1, 2, 4, 8))),
}
_TABLE_OF = {"qkv_rope": "qkv_rope", "glu": "glu", "add_residual": "add"}
#: Of R, B or y in the registers of a warp (128 a thread): above, a candidate only spills.
_MAX_NUMBERS = 4096


def tune_rows(step: Step, adapters: Adapters, repeats: int) -> Iterator[dict[str, Any]]:
    layers = range(step.weights.geometry.layers)
    for name, run in single_ops(step, adapters, step.slots("distinct")):
        if name not in _TABLE_OF:
            continue
        table = _TABLE_OF[name]
        tiles = tiling.tiles_for(adapters.rank)
        before, results = tiles[table], {}
        try:
            for tile in candidates(table, step.num_tokens, adapters.rank):
                tiles[table] = ((tiling.NO_LIMIT, tile),)
                times = time_on_device(
                    lambda run=run: [run(layer, True) for layer in layers],  # type: ignore[misc]
                    device=step.weights.device,
                    repeats=repeats,
                )
                results[tile] = statistics.median(times) / len(layers) * 1e6
        finally:
            tiles[table] = before
        best = min(results, key=lambda tile: results[tile])
        now = tiling.tile_of(table, step.num_tokens, rank=adapters.rank)
        yield {
            "what": name,
            "tokens": step.num_tokens,
            "rank": adapters.rank,
            "best": f"Tile({best.tokens}, {best.columns}, {best.warps})",
            "best_us": round(results[best], 2),
            "now": f"Tile({now.tokens}, {now.columns}, {now.warps})",
            "now_us": round(results.get(now, float("nan")), 2),
        }


def candidates(table: str, num_tokens: int, rank: int) -> Iterator[Tile]:
    """Tiles that fit the registers; element by element only for few tokens, tensor cores only for some."""
    padded = max(16, rank)
    many = (16, 32) if num_tokens <= 64 else (16, 32, 64)
    for tokens in (1,) if num_tokens <= 4 else (1, *many) if num_tokens <= 16 else many:
        for columns, warps in CANDIDATES[table]:
            if max(columns * padded, tokens * columns) <= _MAX_NUMBERS * warps:
                yield Tile(tokens, columns, warps)
