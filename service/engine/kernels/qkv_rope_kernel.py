# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Kernel of `qkv_rope`: each program computes one head of a tile of tokens.

A head consists of the two halves that are rotated against each other and a rest that stays as it is. Each is
a tile of its own, so that the rotation needs no shuffle. Queries go to the output, keys and values to their
pages.
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
    fetch_sums,
    fetch_y,
    late,
    row_scale,
    wait_for_inputs,
)


@triton.jit(do_not_specialize=["T"])
def qkv_rope_kernel(
    y, y_row, q_out, cos, cos_row, sin, sin_row, K, V, blocks, offsets, bias, q_norm, k_norm, norm_eps,
    squares, delta, T,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr,
    BIAS: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, PLUS_ONE: tl.constexpr,
    SUMS: tl.constexpr, SPEC: tl.constexpr, DOT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """HALF: columns of a half, 0 if nothing is rotated. *_TILE: the powers of two that hold the half and the
    rest."""
    REST: tl.constexpr = D - 2 * HALF
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    live = t < T
    rows = t.to(tl.int64)
    head = tl.program_id(1)
    is_rotated = head < HQ + HKV
    segment = (head >= HQ).to(tl.int32) + (head >= HQ + HKV).to(tl.int32)
    i = tl.arange(0, HALF_TILE)
    in_half = i < HALF
    j = 2 * HALF + tl.arange(0, REST_TILE)
    in_rest = j < D
    n = head * D

    slot = fetch_slots(delta, rows, live, SPEC)
    if HALF > 0:
        first_bias = fetch_columns(bias, n + i, in_half, BIAS)[None, :]
        second_bias = fetch_columns(bias, n + HALF + i, in_half, BIAS)[None, :]
        first_weight = _head_weight(q_norm, k_norm, i, in_half, head, HQ, Q_NORM, K_NORM, PLUS_ONE)
        second_weight = _head_weight(q_norm, k_norm, HALF + i, in_half, head, HQ, Q_NORM, K_NORM, PLUS_ONE)
    if REST > 0:
        rest_bias = fetch_columns(bias, n + j, in_rest, BIAS)[None, :]
        rest_weight = _head_weight(q_norm, k_norm, j, in_rest, head, HQ, Q_NORM, K_NORM, PLUS_ONE)
    if SPEC[0] != NONE:
        if HALF > 0:
            first_B = fetch_B(delta, n + i, in_half, SPEC)
            second_B = fetch_B(delta, n + HALF + i, in_half, SPEC)
        if REST > 0:
            rest_B = fetch_B(delta, n + j, in_rest, SPEC)
        R = fetch_R(delta, segment, slot, SPEC)
        R_scale = fetch_R_scale(delta, segment, slot, SPEC)
    wait_for_inputs(SPEC)
    if HALF > 0:
        first = fetch_y(y, y_row, rows, live, n + i, in_half)
        second = fetch_y(y, y_row, rows, live, n + HALF + i, in_half)
        turned = live[:, None] & (i < tl.where(is_rotated, HALF, 0))[None, :]
        c = tl.load(cos + rows[:, None] * cos_row + i[None, :], mask=turned, other=1.0)
        s = tl.load(sin + rows[:, None] * sin_row + i[None, :], mask=turned, other=0.0)
    if REST > 0:
        rest = fetch_y(y, y_row, rows, live, n + j, in_rest)
    if SPEC[0] != NONE:
        h = fetch_h(delta, segment, rows, live, SPEC)
        tl.debug_barrier()  # otherwise the assembler loads the sums first and waits for them
    block = tl.load(blocks + rows, mask=live, other=0).to(tl.int64)
    offset = tl.load(offsets + rows, mask=live, other=0).to(tl.int64)
    sums = fetch_sums(squares, rows, live, SUMS)

    if SPEC[0] != NONE:
        z = apply_R(delta, R, R_scale, h, segment, slot, SPEC)
    scale = row_scale(sums, squares, SUMS)
    square = tl.zeros([BT], tl.float32)
    if HALF > 0:
        first, second = late(first, delta, SPEC), late(second, delta, SPEC)
        if SPEC[0] != NONE:
            first += expand(delta, z, first_B, SPEC, DOT)
            second += expand(delta, z, second_B, SPEC, DOT)
        first = first * scale + first_bias
        second = second * scale + second_bias
        square += tl.sum(first * first + second * second, axis=1)
    if REST > 0:
        rest = late(rest, delta, SPEC)
        if SPEC[0] != NONE:
            rest += expand(delta, z, rest_B, SPEC, DOT)
        rest = rest * scale + rest_bias
        square += tl.sum(rest * rest, axis=1)
    if Q_NORM or K_NORM:
        is_normed = (Q_NORM and head < HQ) or (K_NORM and (head >= HQ and head < HQ + HKV))
        rstd = tl.rsqrt(square / D + norm_eps)[:, None]
        if HALF > 0:
            first *= tl.where(is_normed, rstd * first_weight, 1.0)
            second *= tl.where(is_normed, rstd * second_weight, 1.0)
        if REST > 0:
            rest *= tl.where(is_normed, rstd * rest_weight, 1.0)

    kept = live & (block > 0)
    kv_head = head - HQ - tl.where(is_rotated, 0, HKV)
    place = ((block * HKV + kv_head) * BLOCK_SIZE + offset) * D
    if HALF > 0:
        c, s = late(c, delta, SPEC), late(s, delta, SPEC)
        turned_first = first * c - second * s
        turned_second = second * c + first * s
        _store(q_out, K, V, rows, place, live, kept, head, i, in_half, turned_first, HQ, HKV, D)
        i += HALF
        _store(q_out, K, V, rows, place, live, kept, head, i, in_half, turned_second, HQ, HKV, D)
    if REST > 0:
        _store(q_out, K, V, rows, place, live, kept, head, j, in_rest, rest, HQ, HKV, D)


@triton.jit
def _head_weight(
    q_norm, k_norm, i, inside, head, HQ: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """The norm weight of the head's columns i, float32 [1, columns]. Not meaningful for heads without a
    norm."""
    q_weight = fetch_columns(q_norm, i, inside, Q_NORM)
    k_weight = fetch_columns(k_norm, i, inside, K_NORM)
    w = tl.where(head < HQ, q_weight, k_weight)[None, :]
    if PLUS_ONE:
        w += 1.0
    return w


@triton.jit
def _store(
    q_out, K, V, rows, place, live, kept, head, i, inside, v, HQ: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Store columns i of one head, in the queries or in the page that `place` names."""
    seen = tl.where(head < HQ, live, kept)[:, None] & inside[None, :]
    if head < HQ:
        at = q_out + ((rows * HQ + head) * D)[:, None] + i[None, :]
        tl.store(at, v.to(q_out.dtype.element_ty), mask=seen)
    elif head < HQ + HKV:
        tl.store(K + place[:, None] + i[None, :], v.to(K.dtype.element_ty), mask=seen)
    else:
        tl.store(V + place[:, None] + i[None, :], v.to(V.dtype.element_ty), mask=seen)
