# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""A gathered LoRA in Triton: per token its own A and B. A peer, only as good as such a form needs to be."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SHRINK_COLUMNS, _EXPAND_COLUMNS = 512, 256


@triton.jit
def _shrink(
    x, x_row, A, slots, h, K, G: tl.constexpr, RANK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h[t, g] += A[slots[t], g][:, k] @ x[t, k], one piece of K per program."""
    t, g = tl.program_id(0), tl.program_id(1)
    k = tl.program_id(2) * BK + tl.arange(0, BK)
    r = tl.arange(0, RANK)
    slot = tl.load(slots + t)
    v = tl.load(x + t * x_row + k, mask=k < K, other=0.0).to(tl.float32)
    at = A + (slot * G + g) * RANK * K + r[:, None] * K + k[None, :]
    own = tl.load(at, mask=(k < K)[None, :], other=0.0).to(tl.float32)
    tl.atomic_add(h + (t * G + g) * RANK + r, tl.sum(own * v[None, :], axis=1))


@triton.jit
def _expand(
    y, y_row, B, slots, h, N, W0, W1, G: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[t, n] += B[slots[t]][n] @ h[t, segment of n]."""
    t = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.arange(0, RANK)
    slot = tl.load(slots + t)
    segment = (n >= W0).to(tl.int32) + (n >= W0 + W1).to(tl.int32)
    seen = n < N
    own = tl.load(B + slot * N * RANK + n[:, None] * RANK + r[None, :], mask=seen[:, None], other=0.0)
    z = tl.load(h + (t * G + segment)[:, None] * RANK + r[None, :], mask=seen[:, None], other=0.0)
    v = tl.load(y + t * y_row + n, mask=seen, other=0.0).to(tl.float32)
    v += tl.sum(own.to(tl.float32) * z, axis=1)
    tl.store(y + t * y_row + n, v.to(y.dtype.element_ty), mask=seen)


def add_gathered(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, token_slots: Tensor, widths: tuple[int, ...]
) -> None:
    """y[t] += B[slot] A[slot] x[t]. A: [S, g, r, d_in]; B: [S, N, r]; r a power of two."""
    T, (_, g, rank, d_in) = len(x), A.shape
    h = torch.zeros(T, g, rank, device=x.device)
    W0, W1 = widths[0], widths[1] if g > 1 else B.shape[1]
    pieces = triton.cdiv(d_in, _SHRINK_COLUMNS)
    _shrink[(T, g, pieces)](x, x.stride(0), A, token_slots, h, d_in, g, rank, _SHRINK_COLUMNS)
    tiles = triton.cdiv(B.shape[1], _EXPAND_COLUMNS)
    _expand[(T, tiles)](y, y.stride(0), B, token_slots, h, B.shape[1], W0, W1, g, rank, _EXPAND_COLUMNS)
