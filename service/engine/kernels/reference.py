"""The ops of the adapter path, and their reference implementation: plain torch, any device and dtype.

The docstrings here hold for every implementation: `launch.py` has the same functions as Triton kernels. The
fused ops compute in float32 (float64 stays float64) and round once, when a result is stored. T is always the
number of rows of `y`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from service.engine.kernels.layouts import (
    ACTIVATIONS,
    NO_MODULE,
    PLAIN_ADD,
    AddedDelta,
    GroupDelta,
    GroupFactors,
    Norm,
    QKVShape,
    ResidualAdd,
    RowSquares,
    StepRows,
)


def rank_delta(h: Tensor, R_slots: Tensor, token_slots: Tensor) -> Tensor:
    """z[t] = R_slots[token_slots[t]] @ h[t]

    h: [T, r];  R_slots: [S, r, r];  token_slots: int64 [T] in 0..S-1, where slot 0 holds zeros;  returns
    [T, r] in h.dtype.
    """
    return (R_slots[token_slots].to(h.dtype) @ h[:, :, None])[:, :, 0]


def adapter_delta(x: Tensor, A: Tensor, B: Tensor, R_slots: Tensor, token_slots: Tensor) -> Tensor:
    """y[t] = B @ R_slots[token_slots[t]] @ A @ x[t]

    x: [T, d_in];  A: [r, d_in];  B: [d_out, r];  R_slots: [S, r, r];  token_slots: int64 [T];  returns
    [T, d_out] in x.dtype.
    """
    return rank_delta(x @ A.T, R_slots, token_slots) @ B.T


def segment_cores(h: Tensor, factors: GroupFactors, token_slots: Tensor) -> Tensor:
    """z[t, i] = R_slots[token_slots[t], modules[i]] @ h[t, columns[i]], zero where the slot is 0.

    h: [T, C * r]; returns [T, g, r] in h's computing dtype.
    """
    h = _wide(h)
    rank = factors.rank
    z = h.new_zeros(len(h), len(factors.widths), rank)
    # Rows of the base model may contain anything in h, and are skipped so that they cost nothing.
    rows = token_slots.nonzero()[:, 0]
    slots = token_slots[rows].long()
    for i, (module, column) in enumerate(zip(factors.modules, factors.columns, strict=True)):
        if module != NO_MODULE:
            R = factors.R_slots[slots, module].to(h.dtype)
            if factors.scales is not None:
                R = R * factors.scales[slots, module].to(h.dtype)[:, None, None]
            z[rows, i] = (R @ h[rows, column * rank : (column + 1) * rank, None])[:, :, 0]
    return z


def group_delta(h: Tensor, factors: GroupFactors, token_slots: Tensor) -> Tensor:
    """delta[t] = [B_i @ z[t, i] for every segment i], side by side. h: [T, C * r]; returns [T, N]."""
    z = segment_cores(h, factors, token_slots)
    segments = torch.split(factors.B.to(z.dtype), list(factors.widths))
    return torch.cat([z[:, i] @ B.T for i, B in enumerate(segments)], dim=1)


def add_deltas(y: Tensor, deltas: Sequence[AddedDelta]) -> Tensor:
    """y[t, :N] += Σ over deltas b of B_b R_b[slot_b[t]] h_b[t], in place, one launch for all bases.

    Serves models that cannot be fused, and every further resident basis beside a fused one. y: [T, at least
    N]. A token has a slot other than 0 in at most one of the bases; rows without one are not touched. All
    groups have the same widths; ranks and dtypes may differ. Returns y.
    """
    for delta in deltas:
        rows = delta.token_slots.nonzero()[:, 0]
        added = group_delta(delta.h[rows], delta.factors, delta.token_slots[rows])
        width = delta.factors.width
        y[rows, :width] = (_wide(y[rows, :width]) + added).to(y.dtype)
    return y


def rms_norm(x: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
    """out = x * rsqrt(mean(x²) + eps) * weight, row by row.

    x: [T, N], rows of any stride, such as a part of y. out: [T, N], rows of any stride; may be x itself; None
    allocates it. Returns out, in x's dtype.
    """
    result = _normed(_wide(x), norm).to(x.dtype)
    return result if out is None else out.copy_(result)


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
    _add(y, residual, delta, how)
    return rms_norm(residual, norm) if norm is not None else residual


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
    assert how.post is None, "a norm behind the block needs whole rows first"
    _add(y, residual, delta, how)
    wide = _wide(residual)
    sums = wide.square().sum(1, keepdim=True, dtype=torch.float32)
    return (wide * _weight(norm, wide.dtype)).to(residual.dtype), RowSquares(
        sums, residual.shape[1], norm.eps
    )


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
    gate, up = torch.split(_outputs(y, 2 * width, delta, bias, squares), width, dim=1)
    gate = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")
    return (gate * up).to(y.dtype)


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
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    wide = _outputs(y, sum(heads) * shape.head_dim, delta, shape.bias, squares)
    q, k, v = torch.split(wide.view(len(y), sum(heads), shape.head_dim), heads, dim=1)
    if shape.q_norm is not None:
        q = _normed(q, shape.q_norm)
    if shape.k_norm is not None:
        k = _normed(k, shape.k_norm)
    if shape.rotary_dim:
        assert rows.cos is not None
        assert rows.sin is not None
        cos, sin = (part[:, None, : shape.rotary_dim // 2].to(wide.dtype) for part in (rows.cos, rows.sin))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    live = rows.blocks.nonzero()[:, 0]
    blocks, offsets = rows.blocks[live].long(), rows.offsets[live].long()
    rows.K[blocks, :, offsets] = k[live].to(rows.K.dtype)
    rows.V[blocks, :, offsets] = v[live].to(rows.V.dtype)
    return q.to(y.dtype).contiguous()


def _outputs(
    y: Tensor, width: int, delta: GroupDelta | None, bias: Tensor | None, squares: RowSquares | None
) -> Tensor:
    """Return the outputs of the group's layers: the delta is added before the deferred norm, the bias after
    it."""
    wide = _wide(y[:, :width])
    if delta is not None:
        wide = wide + group_delta(y[:, width:], delta.factors, delta.token_slots)
    if squares is not None:
        mean = squares.sums.sum(1, keepdim=True) / squares.width
        wide = wide * torch.rsqrt(mean + squares.eps).to(wide.dtype)
    return wide if bias is None else wide + bias.to(wide.dtype)


def _add(y: Tensor, residual: Tensor, delta: GroupDelta | None, how: ResidualAdd) -> None:
    width = residual.shape[1]
    wide = _outputs(y, width, delta, how.bias, None)
    if how.post is not None:
        wide = _normed(wide, how.post)
    residual.copy_(_wide(residual) + wide * how.multiplier)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * _weight(norm, x.dtype)


def _weight(norm: Norm, dtype: torch.dtype) -> Tensor:
    weight = norm.weight.to(dtype)
    return weight + 1 if norm.plus_one else weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, H, D]; cos, sin: [T, 1, rot / 2]. Columns from rot on pass through unchanged."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
