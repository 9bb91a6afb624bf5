"""What the kernels are handed of a delta and of a norm put off, and which way R is applied.

The layout of both tuples stands in `device_functions.py`. R is gathered inside the consumer for
small ranks and few tokens; otherwise `core_kernel` applies it once per token, and the consumer reads z.
Shapes alone decide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from service.engine.kernels import deltas, device_functions, early_launch, tiling
from service.engine.kernels.layouts import NO_MODULE, GroupDelta, GroupFactors, RowSquares
from service.engine.kernels.tiling import Tile

#: Rows of R that a program of `core_kernel` holds at a time: [32, 128] floats are 32 registers a thread.
CORE_CHUNK = 32


@dataclass(frozen=True)
class DeltaArguments:
    """One delta as kernel arguments. z: kept alive here until the launch, None if the consumer gathers R."""

    values: tuple[Any, ...]
    spec: tuple[int, ...]
    z: Tensor | None = None


def no_delta(like: Tensor) -> DeltaArguments:
    """For the base model alone; `like` stands in for pointers that are not read."""
    values = (like, 0, like, like, 0, 0, 0, 0, 0, like, 0, like)
    return DeltaArguments(values, (device_functions.NONE.value, *[0] * 5, early_launch.is_early(like)))


def launch_options(arguments: DeltaArguments, warps: int) -> dict[str, Any]:
    """How a kernel that takes this delta is launched."""
    options: dict[str, Any] = {"num_warps": warps}
    return {**options, "launch_pdl": True} if arguments.spec[-1] else options


def delta_arguments(delta: GroupDelta | None, y: Tensor, tile: Tile) -> DeltaArguments:
    """Of a delta whose h stands in y after its outputs; launches `core_kernel` where that pays."""
    if delta is None:
        return no_delta(y)
    factors = delta.factors
    assert y.shape[1] >= factors.width + factors.h_width
    assert len(delta.token_slots) == len(y)
    arguments = gathered(factors, delta.token_slots, y[:, factors.width :])
    return apply_core(arguments, factors, len(y), tile)


def gathered(factors: GroupFactors, token_slots: Tensor, h: Tensor) -> DeltaArguments:
    """Of a delta whose consumer applies R itself. h: [T, C * r], rows of any stride."""
    R = factors.R_slots
    assert len(token_slots) < 2 or token_slots.stride(0) == 1
    assert h.stride(1) == 1 or h.shape[1] == 1
    offsets = [max(module, 0) * R.stride(1) for module in factors.modules]
    columns = [
        -1 if module == NO_MODULE else column
        for module, column in zip(factors.modules, factors.columns, strict=True)
    ]
    scales = factors.scales if factors.scales is not None else factors.B
    kind = device_functions.INT8 if factors.scales is not None else device_functions.FLOAT
    values = (
        *(h, h.stride(0), token_slots, R, R.stride(0), R.stride(1)),
        *_of_three(offsets),
        *(scales, scales.stride(0), factors.B),
    )
    spec = (kind.value, factors.rank, padded(factors.rank), *_of_three(columns), early_launch.is_early(h))
    return DeltaArguments(values, spec)


def apply_core(
    arguments: DeltaArguments, factors: GroupFactors, num_tokens: int, tile: Tile
) -> DeltaArguments:
    """The same delta with z = R h made first, for ranks and numbers of tokens where that pays."""
    num_gathered = tile.tokens * padded(factors.rank) ** 2
    if num_gathered <= tile.warps * tiling.MAX_GATHERED_NUMBERS and num_tokens <= tiling.MAX_GATHERED_TOKENS:
        return arguments
    return with_core(arguments, factors, num_tokens)


def with_core(arguments: DeltaArguments, factors: GroupFactors, num_tokens: int) -> DeltaArguments:
    rank, num_segments = factors.rank, len(factors.widths)
    z = torch.empty(num_tokens, num_segments * rank, dtype=factors.B.dtype, device=factors.B.device)
    tokens = 1 if num_tokens <= tiling.MAX_SINGLE_CORE_TOKENS else 16
    chunk = min(CORE_CHUNK, arguments.spec[2])
    deltas.core_kernel[(-(-num_tokens // tokens), num_segments)](
        *(arguments.values, z, z.stride(0), num_tokens, arguments.spec, tokens, chunk),
        **launch_options(arguments, 4),
    )
    values = (z, z.stride(0), *arguments.values[2:])
    return replace(arguments, values=values, spec=(device_functions.READY.value, *arguments.spec[1:]), z=z)


def squares_arguments(squares: RowSquares | None, like: Tensor) -> tuple[Tensor, int, int, float]:
    """Sums, how many a row, the row's width, eps; `like` stands in for what is not read."""
    if squares is None:
        return like, 0, 0, 0.0
    assert squares.sums.is_contiguous()
    return squares.sums, squares.sums.shape[1], squares.width, squares.eps


def num_sums(squares: RowSquares | None) -> int:
    """As a constant of the kernels: padded, 0 if no norm was put off."""
    return 0 if squares is None else padded(squares.sums.shape[1])


def padded(count: int) -> int:
    """The power of two that holds `count` columns, 16 at least: tensor cores want that."""
    return max(16, 1 << (count - 1).bit_length())


def _of_three(numbers: list[int]) -> tuple[int, int, int]:
    first, second, third = [*numbers, 0, 0][:3]
    return first, second, third
