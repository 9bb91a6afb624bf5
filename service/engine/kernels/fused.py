"""The fused ops of a decoder layer: each op that reads a GEMM's output also applies R and B to it.

On CUDA tensors they are Triton kernels (`launch.py`), on others the reference implementation. None of them
waits for the device, and all are safe to capture in a CUDA graph: shapes alone decide what is launched, never
the slots. A row of slot 0 loads no R, and NaN in one slot reaches only the rows of that slot. `layouts.py`
documents the layouts. T is always the number of rows of `y`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from service.engine.kernels import reference
from service.engine.kernels.layouts import (
    PLAIN_ADD,
    AddedDelta,
    GroupDelta,
    Norm,
    QKVShape,
    ResidualAdd,
    RowSquares,
    StepRows,
)

#: Activations of `glu`.
ACTIVATIONS = ("silu", "gelu_tanh")


def qkv_rope(
    y: Tensor,
    shape: QKVShape,
    rows: StepRows,
    delta: GroupDelta | None = None,
    squares: RowSquares | None = None,
) -> Tensor:
    """q, k, v = split((y[:, :N] + delta) * rstd + bias); q, k = rope(norm(q, k)); K, V to their pages.

    y: [T, N + C * r] with N = shape.width = (Hq + 2 Hkv) * D, the output of the group q, k, v.
    delta: of a group with the widths (Hq D, Hkv D, Hkv D); None for the base model alone.
    squares: the norm that `add_residual` deferred; None if y was computed from normalised rows.
    Returns q [T, Hq, D] in y's dtype, contiguous. Writes rows.K[blocks[t], :, offsets[t]], and rows.V
    likewise, rounded to their dtype.
    """
    return _ops(y).qkv_rope(y, shape, rows, delta, squares)  # type: ignore[no-any-return]


def glu(
    y: Tensor,
    width: int,
    act: str,
    delta: GroupDelta | None = None,
    *,
    bias: Tensor | None = None,
    squares: RowSquares | None = None,
) -> Tensor:
    """out = act(gate) * up, where gate, up = split((y[:, :2 width] + delta) * rstd + bias).

    y: [T, 2 * width + C * r], the output of the group gate, up. act: one of ACTIVATIONS. delta: of a group
    with the widths (width, width). bias: [2 * width]. Returns [T, width] in y's dtype.
    """
    assert act in ACTIVATIONS, act
    return _ops(y).glu(y, width, act, delta, bias=bias, squares=squares)  # type: ignore[no-any-return]


def add_rms_norm(
    y: Tensor,
    residual: Tensor,
    norm: Norm | None,
    delta: GroupDelta | None = None,
    how: ResidualAdd = PLAIN_ADD,
) -> Tensor:
    """residual += multiplier * post(y[:, :N] + delta + bias); returns norm(residual).

    y: [T, N + C * r], the output of o or down (a group of one segment).
    residual: [T, N], contiguous; changed in place, and rounded to its dtype before the norm reads it.
    norm: with None, `residual` itself is returned (for models whose blocks read the residual as it is).
    Returns [T, N] in residual's dtype.
    """
    return _ops(y).add_rms_norm(y, residual, norm, delta, how)  # type: ignore[no-any-return]


def add_residual(
    y: Tensor,
    residual: Tensor,
    norm: Norm,
    delta: GroupDelta | None = None,
    how: ResidualAdd = PLAIN_ADD,
) -> tuple[Tensor, RowSquares]:
    """`add_rms_norm` with the division deferred to the op behind the next GEMM, so that no program needs a
    whole row.

        residual += multiplier * (y[:, :N] + delta + bias)
        returns x = residual * weight, and the partial sums of residual²

    Because W(x * rstd) = (W x) * rstd, `qkv_rope` and `glu` can multiply the GEMM's output by rstd; pass them
    the `RowSquares`. The delta's h comes from the same GEMM and needs nothing else. Only for bfloat16 and
    float32: x has the magnitude of the residual, which may exceed the range of float16. how.post must be
    None. Returns x [T, N].
    """
    assert how.post is None
    return _ops(y).add_residual(y, residual, norm, delta, how)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
    """out = x * rsqrt(mean(x²) + eps) * weight, row by row.

    x: [T, N], rows of any stride, such as a part of y. out: [T, N], rows of any stride; may be x itself; None
    allocates it. Returns out, in x's dtype.
    """
    return _ops(x).rms_norm(x, norm, out)  # type: ignore[no-any-return]


def add_deltas(y: Tensor, deltas: Sequence[AddedDelta]) -> Tensor:
    """y[t, :N] += Σ over deltas b of B_b R_b[slot_b[t]] h_b[t], in place, one launch for all bases.

    Serves models that cannot be fused, and every further resident basis beside a fused one. y: [T, at least
    N]. A token has a slot other than 0 in at most one of the bases; rows without one are not touched. All
    groups have the same widths; ranks and dtypes may differ. Returns y.
    """
    return _ops(y).add_deltas(y, deltas)  # type: ignore[no-any-return]


def _ops(like: Tensor) -> ModuleType:
    if not like.is_cuda:
        return reference
    from service.engine.kernels import launch  # Triton need not be installed where there is no CUDA

    return launch
