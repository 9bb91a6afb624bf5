# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Kernels outside the fused ops: `core_kernel` applies R once per token, `add_deltas_kernel` adds the deltas
of several bases to y."""

import triton
import triton.language as tl

from service.engine.kernels.device_functions import (
    INT8,
    apply_R,
    expand,
    fetch_B,
    fetch_h,
    fetch_R,
    fetch_R_scale,
    fetch_slots,
    pick,
    wait_for_inputs,
)


@triton.jit(do_not_specialize=["T"])
def core_kernel(
    delta, z, z_row, T, SPEC: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """z[t, segment] = R_slots[slots[t]] @ h[t], CHUNK rows of R at a time. Every row of z is written.

    A tile of tokens that share one slot (as in a prefill) loads R once; other tiles load it for each token.
    """
    segment = tl.program_id(1)
    start = tl.program_id(0) * BT
    t = start + tl.arange(0, BT)
    live = t < T
    rows = t.to(tl.int64)
    slot = tl.load(delta[2] + rows, mask=live, other=0).to(tl.int64)
    wait_for_inputs(SPEC)
    if BT == 1:
        _core_of_each(delta, z, z_row, start, 1, segment, T, SPEC, CHUNK)
    else:
        top = tl.max(slot, axis=0)
        low = tl.min(tl.where(live, slot, top), axis=0)
        if top == low:
            _core_of_run(delta, z, z_row, rows, live, top, segment, SPEC, CHUNK)
        else:
            _core_of_each(delta, z, z_row, start, BT, segment, T, SPEC, CHUNK)


@triton.jit
def _core_of_run(delta, z, z_row, rows, live, slot, segment, SPEC: tl.constexpr, CHUNK: tl.constexpr):
    """All rows have one slot: a GEMM with its R."""
    RANK: tl.constexpr = SPEC[1]
    i = tl.arange(0, SPEC[2])
    column = pick(segment, SPEC[3], SPEC[4], SPEC[5])
    width = tl.where((slot > 0) & (column >= 0), RANK, 0)  # no R for the base model: z is zero
    offset = pick(segment, delta[6], delta[7], delta[8])
    at = delta[0] + rows[:, None] * delta[1] + column * RANK + i[None, :]
    h = tl.load(at, mask=live[:, None] & (i < width)[None, :], other=0.0)
    scale = 1.0
    if SPEC[0] == INT8:
        scale = tl.load(delta[9] + slot * delta[10] + offset // delta[5], mask=slot > 0, other=0.0)
    for first in tl.static_range(0, RANK, CHUNK):
        j = first + tl.arange(0, CHUNK)
        at = delta[3] + slot * delta[4] + offset + j[:, None] * RANK + i[None, :]
        R = tl.load(at, mask=(j < width)[:, None] & (i < width)[None, :], other=0)
        part = tl.dot(h, tl.trans(R.to(h.dtype)), input_precision="ieee") * scale
        at = z + rows[:, None] * z_row + segment * RANK + j[None, :]
        tl.store(at, part.to(z.dtype.element_ty), mask=live[:, None] & (j < RANK)[None, :])


@triton.jit
def _core_of_each(
    delta, z, z_row, start, COUNT: tl.constexpr, segment, T, SPEC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """COUNT tokens from `start` on, one after another, each with its own R."""
    RANK: tl.constexpr = SPEC[1]
    i = tl.arange(0, SPEC[2])
    column = pick(segment, SPEC[3], SPEC[4], SPEC[5])
    offset = pick(segment, delta[6], delta[7], delta[8])
    for k in range(COUNT):
        is_live = start + k < T
        row = (start + k).to(tl.int64)
        slot = tl.load(delta[2] + row, mask=is_live, other=0).to(tl.int64)
        seen = i < tl.where((slot > 0) & (column >= 0), RANK, 0)
        h = tl.load(delta[0] + row * delta[1] + column * RANK + i, mask=seen, other=0.0).to(tl.float32)
        scale = 1.0
        if SPEC[0] == INT8:
            scale = tl.load(delta[9] + slot * delta[10] + offset // delta[5], mask=slot > 0, other=0.0)
        for first in tl.static_range(0, RANK, CHUNK):
            j = first + tl.arange(0, CHUNK)
            at = delta[3] + slot * delta[4] + offset + j[:, None] * RANK + i[None, :]
            R = tl.load(at, mask=(j < RANK)[:, None] & seen[None, :], other=0).to(tl.float32)
            part = tl.sum(R * h[None, :], axis=1) * scale
            at = z + row * z_row + segment * RANK + j
            tl.store(at, part.to(z.dtype.element_ty), mask=j < tl.where(is_live, RANK, 0))


@triton.jit(do_not_specialize=["T"])
def add_deltas_kernel(
    y, y_row, deltas, T, WIDTHS: tl.constexpr, SPECS: tl.constexpr, DOT: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """y += the deltas of all bases. deltas, SPECS: one per basis. Each program column is a tile of one
    segment."""
    FIRST: tl.constexpr = SPECS[0]
    wait_for_inputs(FIRST)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    live = t < T
    rows = t.to(tl.int64)
    tile = tl.program_id(1)
    tiles0: tl.constexpr = (WIDTHS[0] + BN - 1) // BN
    tiles1: tl.constexpr = (WIDTHS[1] + BN - 1) // BN
    segment = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
    i = (tile - pick(segment, 0, tiles0, tiles0 + tiles1)) * BN + tl.arange(0, BN)
    inside = i < pick(segment, WIDTHS[0], WIDTHS[1], WIDTHS[2])
    n = i + pick(segment, 0, WIDTHS[0], WIDTHS[0] + WIDTHS[1])
    added = tl.zeros([BT, BN], tl.float32)
    touched = tl.zeros([BT], tl.int32)
    for b in tl.static_range(len(SPECS)):
        own = tl.load(deltas[b][2] + rows, mask=live, other=0) > 0
        if tl.max(own.to(tl.int32), axis=0) > 0:  # else no token of the tile has this basis
            added += _delta_of_basis(deltas, b, segment, rows, own, n, inside, SPECS, DOT)
        touched += own.to(tl.int32)
    at = y + rows[:, None] * y_row + n[None, :]
    seen = (touched > 0)[:, None] & inside[None, :]
    v = tl.load(at, mask=seen, other=0.0).to(tl.float32) + added
    tl.store(at, v.to(y.dtype.element_ty), mask=seen)


@triton.jit
def _delta_of_basis(
    deltas, b: tl.constexpr, segment, rows, own, n, inside, SPECS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    SPEC: tl.constexpr = SPECS[b]
    slot = fetch_slots(deltas[b], rows, own, SPEC)
    h = fetch_h(deltas[b], segment, rows, own, SPEC)
    B = fetch_B(deltas[b], n, inside, SPEC)
    R = fetch_R(deltas[b], segment, slot, SPEC)
    R_scale = fetch_R_scale(deltas[b], segment, slot, SPEC)
    z = apply_R(deltas[b], R, R_scale, h, segment, slot, SPEC)
    return expand(deltas[b], z, B, SPEC, DOT)
