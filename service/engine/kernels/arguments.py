"""The arguments of a kernel that describe a delta and a deferred norm, and the choice of how R is applied.

`device_functions.py` documents the layout of both tuples. For small ranks and few tokens the consumer gathers
R itself; otherwise `core_kernel` applies R once per token, and the consumer reads z. Shapes alone decide.

**Early launch** (programmatic dependent launch, from sm_90 on): a kernel begins while the one before it still
runs. It reads what no kernel of the step writes (slots, factors, weights), waits (`gdc_wait`) and continues.
Every program of the kernel must reach the wait: a later kernel of the ordinary kind waits for this one, and
thereby for all kernels before it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from service.engine.kernels import deltas, device_functions, tiling
from service.engine.kernels.layouts import NO_MODULE, GroupDelta, GroupFactors, RowSquares
from service.engine.kernels.tiling import Tile

#: Rows of R that a program of `core_kernel` holds at a time: [32, 128] floats take 32 registers per thread.
CORE_CHUNK = 32


@dataclass(frozen=True)
class DeltaArguments:
    """One delta as kernel arguments."""

    #: The tuple `delta` of run-time values.
    values: tuple[Any, ...]
    #: The tuple SPEC of constants.
    spec: tuple[int, ...]
    #: Kept alive here until the launch; None if the consumer gathers R.
    z: Tensor | None = None


def is_early(like: Tensor) -> bool:
    """Whether kernels on this tensor's device are launched early."""
    return like.is_cuda and _can_launch_early(like.device)


@functools.cache
def _can_launch_early(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def no_delta(like: Tensor) -> DeltaArguments:
    """Return the arguments for the base model alone. `like` stands in for pointers that are not read."""
    values = (like, 0, like, like, 0, 0, 0, 0, 0, like, 0, like)
    return DeltaArguments(values, (device_functions.NONE.value, *[0] * 5, is_early(like)))


def launch_options(arguments: DeltaArguments, warps: int) -> dict[str, Any]:
    """Return the launch options of a kernel that takes this delta."""
    options: dict[str, Any] = {"num_warps": warps}
    return {**options, "launch_pdl": True} if arguments.spec[-1] else options


def delta_arguments(delta: GroupDelta | None, y: Tensor, tile: Tile) -> DeltaArguments:
    """Return the arguments of a delta whose h follows the outputs in y. Launches `core_kernel` where that
    pays."""
    if delta is None:
        return no_delta(y)
    factors = delta.factors
    assert y.shape[1] >= factors.width + factors.h_width
    assert len(delta.token_slots) == len(y)
    arguments = gathered(factors, delta.token_slots, y[:, factors.width :])
    return apply_core(arguments, factors, len(y), tile)


def gathered(factors: GroupFactors, token_slots: Tensor, h: Tensor) -> DeltaArguments:
    """Return the arguments of a delta whose consumer applies R itself. h: [T, C * r], rows of any stride."""
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
    spec = (kind.value, factors.rank, padded(factors.rank), *_of_three(columns), is_early(h))
    return DeltaArguments(values, spec)


def apply_core(
    arguments: DeltaArguments, factors: GroupFactors, num_tokens: int, tile: Tile
) -> DeltaArguments:
    """Return the same delta, with z = R h computed first if that is faster at this rank and number of
    tokens."""
    num_gathered = tile.tokens * padded(factors.rank) ** 2
    if num_gathered <= tile.warps * tiling.MAX_GATHERED_NUMBERS and num_tokens <= tiling.MAX_GATHERED_TOKENS:
        return arguments
    return with_core(arguments, factors, num_tokens)


def with_core(arguments: DeltaArguments, factors: GroupFactors, num_tokens: int) -> DeltaArguments:
    """Return the same delta, with z = R h computed by `core_kernel`."""
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
    """Sums, their number per row, the width of a row, and eps. `like` stands in for what is not read."""
    if squares is None:
        return like, 0, 0, 0.0
    assert squares.sums.is_contiguous()
    return squares.sums, squares.sums.shape[1], squares.width, squares.eps


def num_sums(squares: RowSquares | None) -> int:
    """Return the number of sums per row as a constant of the kernels: padded, 0 if no norm was deferred."""
    return 0 if squares is None else padded(squares.sums.shape[1])


def padded(count: int) -> int:
    """Return the power of two that holds `count` columns; at least 16, as tensor cores require."""
    return max(16, 1 << (count - 1).bit_length())


def _of_three(numbers: list[int]) -> tuple[int, int, int]:
    first, second, third = [*numbers, 0, 0][:3]
    return first, second, third
