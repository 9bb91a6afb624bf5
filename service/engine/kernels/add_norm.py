# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Kernels that add y and its delta to the residual, and RMS norms.

`add_kernel` works in tiles. Many programs share a row, so the norm is deferred or left to `row_kernel`, which
holds a whole row in one program.
"""

import triton
import triton.language as tl

from service.engine.kernels.device_functions import (
    NONE,
    apply_R,
    expand,
    fetch_B,
    fetch_columns,
    fetch_h,
    fetch_R,
    fetch_R_scale,
    fetch_slots,
    fetch_y,
    late,
    wait_for_inputs,
)


@triton.jit(do_not_specialize=["T"])
def add_kernel(
    y, y_row, residual, x, sums, weight, bias, multiplier, delta, T,
    N: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr, PLUS_ONE: tl.constexpr,
    SPEC: tl.constexpr, DOT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """With RESIDUAL: residual += multiplier * (y + delta + bias), otherwise y += delta. With SCALED also x =
    residual * weight, and sums[t, program] = Σ residual² over the program's columns."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    live = t < T
    inside = n < N
    rows = t.to(tl.int64)
    slot = fetch_slots(delta, rows, live, SPEC)
    bias_ = fetch_columns(bias, n, inside, BIAS)
    if SCALED:
        w = fetch_columns(weight, n, inside, True)
    if SPEC[0] != NONE:
        B = fetch_B(delta, n, inside, SPEC)
        R = fetch_R(delta, 0, slot, SPEC)
        R_scale = fetch_R_scale(delta, 0, slot, SPEC)
    wait_for_inputs(SPEC)
    v = fetch_y(y, y_row, rows, live, n, inside)
    if RESIDUAL:
        old = fetch_y(residual, N, rows, live, n, inside)
    if SPEC[0] != NONE:
        h = fetch_h(delta, 0, rows, live, SPEC)
        z = apply_R(delta, R, R_scale, h, 0, slot, SPEC)
    v = late(v, delta, SPEC)
    if SPEC[0] != NONE:
        v += expand(delta, z, B, SPEC, DOT)
    v += bias_[None, :]
    seen = live[:, None] & inside[None, :]
    if RESIDUAL:
        rounded = (late(old, delta, SPEC) + multiplier * v).to(residual.dtype.element_ty)
        tl.store(residual + rows[:, None] * N + n[None, :], rounded, mask=seen)
        if SCALED:
            v = rounded.to(tl.float32)
            if PLUS_ONE:
                w += 1.0
            scaled = (v * w[None, :]).to(x.dtype.element_ty)
            tl.store(x + rows[:, None] * N + n[None, :], scaled, mask=seen)
            at = sums + rows * tl.num_programs(1) + tl.program_id(1)
            tl.store(at, tl.sum(v * v, axis=1), mask=live)
    else:
        tl.store(y + rows[:, None] * y_row + n[None, :], v.to(y.dtype.element_ty), mask=seen)


@triton.jit
def row_kernel(
    y, y_row, residual, out, out_row, weight, eps, post_weight, post_eps, bias, multiplier, delta, B_T,
    N: tl.constexpr, BN: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr,
    POST: tl.constexpr, POST_PLUS_ONE: tl.constexpr, BIAS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """One row per program. With RESIDUAL: residual += multiplier * post(y + delta + bias), then out =
    norm(residual); otherwise out = norm(y)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    inside = n < N
    rows, live = row + tl.arange(0, 1), tl.arange(0, 1) < 1
    slot = fetch_slots(delta, rows, live, SPEC)
    bias_ = fetch_columns(bias, n, inside, BIAS)
    w = fetch_columns(weight, n, inside, NORM)
    post_w = fetch_columns(post_weight, n, inside, POST)
    if SPEC[0] != NONE:
        PADDED: tl.constexpr = SPEC[2]
        i = tl.arange(0, PADDED)
        seen = (i < SPEC[1])[:, None] & inside[None, :]
        B = tl.load(
            B_T + i[:, None] * N + n[None, :], mask=seen, other=0.0
        )  # all of it, before the wait for R
        R = fetch_R(delta, 0, slot, SPEC)
        R_scale = fetch_R_scale(delta, 0, slot, SPEC)
    wait_for_inputs(SPEC)
    v = tl.load(y + row * y_row + n, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        old = tl.load(residual + row * N + n, mask=inside, other=0.0).to(tl.float32)
    if SPEC[0] != NONE:
        h = fetch_h(delta, 0, rows, live, SPEC)
        z = apply_R(delta, R, R_scale, h, 0, slot, SPEC)
        z = tl.reshape(z, [PADDED])
        v += tl.sum(z[:, None] * B.to(tl.float32), axis=0)
    v += bias_
    if RESIDUAL:
        if POST:
            if POST_PLUS_ONE:
                post_w += 1.0
            v *= tl.rsqrt(tl.sum(v * v, axis=0) / N + post_eps) * post_w
        rounded = (old + multiplier * v).to(residual.dtype.element_ty)
        tl.store(residual + row * N + n, rounded, mask=inside)
        v = tl.where(inside, rounded.to(tl.float32), 0.0)
    if NORM:
        if PLUS_ONE:
            w += 1.0
        v *= tl.rsqrt(tl.sum(v * v, axis=0) / N + eps) * w
        tl.store(out + row * out_row + n, v.to(out.dtype.element_ty), mask=inside)
