# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Kernel of `glu`: a tile of tokens by a tile of columns per program, gate and up together."""

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
def glu_kernel(
    y, y_row, out, bias, squares, delta, T, WIDTH: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr,
    SUMS: tl.constexpr, SPEC: tl.constexpr, DOT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    live = t < T
    inside = n < WIDTH
    rows = t.to(tl.int64)
    slot = fetch_slots(delta, rows, live, SPEC)
    gate_bias = fetch_columns(bias, n, inside, BIAS)
    up_bias = fetch_columns(bias, WIDTH + n, inside, BIAS)
    if SPEC[0] != NONE:
        gate_B = fetch_B(delta, n, inside, SPEC)
        up_B = fetch_B(delta, WIDTH + n, inside, SPEC)
        gate_R = fetch_R(delta, 0, slot, SPEC)
        up_R = fetch_R(delta, 1, slot, SPEC)
        gate_scale = fetch_R_scale(delta, 0, slot, SPEC)
        up_scale = fetch_R_scale(delta, 1, slot, SPEC)
    wait_for_inputs(SPEC)
    gate = fetch_y(y, y_row, rows, live, n, inside)
    up = fetch_y(y, y_row, rows, live, WIDTH + n, inside)
    if SPEC[0] != NONE:
        gate_h = fetch_h(delta, 0, rows, live, SPEC)
        up_h = fetch_h(delta, 1, rows, live, SPEC)
        tl.debug_barrier()  # otherwise the assembler loads the sums first and waits for them
    sums = fetch_sums(squares, rows, live, SUMS)

    if SPEC[0] != NONE:
        gate_z = apply_R(delta, gate_R, gate_scale, gate_h, 0, slot, SPEC)
        up_z = apply_R(delta, up_R, up_scale, up_h, 1, slot, SPEC)
    gate, up = late(gate, delta, SPEC), late(up, delta, SPEC)
    if SPEC[0] != NONE:
        gate += expand(delta, gate_z, gate_B, SPEC, DOT)
        up += expand(delta, up_z, up_B, SPEC, DOT)
    scale = row_scale(sums, squares, SUMS)
    gate = gate * scale + gate_bias[None, :]
    up = up * scale + up_bias[None, :]
    if GELU:  # x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/π) (x + 0.044715 x³)
        v = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        v = gate * tl.sigmoid(gate) * up
    at = out + rows[:, None] * WIDTH + n[None, :]
    tl.store(at, v.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])
