"""How many rows a fused weight should have: matrix libraries choose their kernels by shape, and a few rows of
zeros more can bring a faster one.

    y [T, n] = x [T, d_in] W[:n]ᵀ        n >= the rows that are needed, another n for another T

H200, cuBLAS 13, bfloat16, 8B geometry, rank 16: the rows of A cost down_proj 6 % at one token and at 32, and
3 to 4 % with 80 zero rows more; o_proj at 256 tokens 3 % against -5 %. Which number is best follows no rule
(multiples of the tiles are not), so a few are timed when a model is fused: about two seconds, CUDA only.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: So that every row of y begins at 16 bytes: tensor cores and vector loads want it.
_ALIGNED = 8
#: Rows tried: the multiples of this among the next _MAX_EXTRA.
_STEP, _MAX_EXTRA = 32, 256
#: Numbers of tokens that are timed; one between two of them takes the rows of the larger.
_POINTS = (1, 4, 16, 32, 64, 128, 192, 256, 512, 1024, 2048)
#: Smaller weights are not worth it; the largest cache of a device must not hold what is timed.
_MIN_BYTES, _TIMED_BYTES = 8 * 1024**2, 256 * 1024**2
#: More rows must save so much of the time to be taken: they take memory, and times are noisy.
_MIN_GAIN = 0.01
_REPEATS = 5


@dataclass(frozen=True)
class RowPlan:
    """rows[i]: of a product of more than points[i - 1] and up to points[i] tokens; the last for all above."""

    points: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def max_rows(self) -> int:
        return max(self.rows)

    def rows_for(self, num_tokens: int) -> int:
        return self.rows[min(bisect_left(self.points, num_tokens), len(self.rows) - 1)]


def plan_rows(num_rows: int, like: Tensor) -> RowPlan:
    """For a weight of at least `num_rows` rows. like: [any, d_in], in its dtype and on its device."""
    aligned = -(-num_rows // _ALIGNED) * _ALIGNED
    d_in = like.shape[1]
    if like.device.type != "cuda" or aligned * d_in * like.itemsize < _MIN_BYTES:
        return RowPlan((1,), (aligned,))
    return _timed_plan(aligned, d_in, like.dtype, like.device)


@functools.cache
@torch.no_grad()
def _timed_plan(num_rows: int, d_in: int, dtype: torch.dtype, device: torch.device) -> RowPlan:
    first = -(-(num_rows + 1) // _STEP) * _STEP
    candidates = (num_rows, *range(first, num_rows + _MAX_EXTRA + 1, _STEP))
    count = max(2, -(-_TIMED_BYTES // (num_rows * d_in * dtype.itemsize)))
    began = time.perf_counter()
    try:
        shape = (count, candidates[-1], d_in)
        weights = torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
        rows = []
        for num_tokens in _POINTS:
            x = torch.empty(num_tokens, d_in, dtype=dtype, device=device).normal_()
            times = [_seconds(x, weights[:, :n]) for n in candidates]
            is_gain = min(times) < (1 - _MIN_GAIN) * times[0]
            rows.append(candidates[times.index(min(times))] if is_gain else num_rows)
    except torch.OutOfMemoryError:
        logger.warning("no memory to try out %d x %d products; their shape stays", num_rows, d_in)
        return RowPlan((1,), (num_rows,))
    shown = ", ".join(f"{t}: {n}" for t, n in zip(_POINTS, rows, strict=True) if n != num_rows)
    seconds = time.perf_counter() - began
    logger.info("rows for %d x %d by tokens: %s (%.1f s)", num_rows, d_in, shown or "no more", seconds)
    return RowPlan(_POINTS, tuple(rows))


def _seconds(x: Tensor, weights: Tensor) -> float:
    """The median time of the products with all of `weights`, replayed without the host."""

    def run() -> None:
        for weight in weights:
            torch.mm(x, weight.t())

    stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize(x.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    for _ in range(1 + _REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(x.device)
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])
