# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Device functions that the kernels share: R for a tile of tokens, B for a tile of columns, the put-off norm.

They come in two kinds, and every kernel calls them in this order: `fetch_*` start loads, the rest waits for
what they bring. First what no kernel of the step writes: slots, B, R (last of these, because its address
waits for the slot), weights. Then `wait_for_inputs`, then what the kernels before have written. At few tokens
an op takes as long as its chain of loads (0.3 to 0.7 µs each), and a kernel that is launched early goes
through the first part of it while the GEMM before still runs. For the same reason what was loaded goes
through `late` before it meets the product with B.

What a kernel has to know of a delta comes as one tuple `delta` of run-time values

    (h, h_row, slots, R, R_slot, R_module, offset0, offset1, offset2, scales, scales_row, B)

    h: first h column of row 0, h_row its row stride; offset_i: where segment i's R begins within a slot
    (module * R_module); scales [S, M] of int8; B [N, rank]

and one tuple SPEC of constants (kind, rank, padded rank, column0, column1, column2, is_early)

    kind: how z is come by, below. column_i: segment i's h block, -1 if it is no target module. is_early:
    whether the kernel is launched before its inputs are there (programmatic dependent launch).

Offsets and not module indices, because Triton compiles a kernel anew for arguments that are multiples of 16:
offsets are, module indices now and then.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: Kinds of a delta: none at all; z stands ready in place of h, one block per segment; R as floats; R as int8.
NONE = tl.constexpr(0)
READY = tl.constexpr(1)
FLOAT = tl.constexpr(2)
INT8 = tl.constexpr(3)


@triton.jit
def pick(segment, first, second, third):
    """The segment's own of three values."""
    return tl.where(segment == 0, first, tl.where(segment == 1, second, third))


@triton.jit
def wait_for_inputs(SPEC: tl.constexpr):
    """Until the kernels before have ended, in a kernel that was launched early; and let the next one begin.

    Only what was written before the last kernel that was not launched early may be read above this: slots
    and weights, not residuals.
    """
    if SPEC[6]:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_slots(delta, rows, live, SPEC: tl.constexpr):
    """The slot of every row [BT] int64; 0 where R is not needed."""
    if SPEC[0] == FLOAT or SPEC[0] == INT8:
        return tl.load(delta[2] + rows, mask=live, other=0).to(tl.int64)
    else:
        return rows * 0


@triton.jit
def fetch_h(delta, segment, rows, live, SPEC: tl.constexpr):
    """h [BT, padded rank] of one segment, or z if that is ready. rows: int64 [BT]; live: which exist."""
    i = tl.arange(0, SPEC[2])
    column = segment + 0 if SPEC[0] == READY else pick(segment, SPEC[3], SPEC[4], SPEC[5])
    seen = live[:, None] & (i < tl.where(column >= 0, SPEC[1], 0))[None, :]
    at = delta[0] + rows[:, None] * delta[1] + column * SPEC[1] + i[None, :]
    return tl.load(at, mask=seen, other=0.0)


@triton.jit
def fetch_B(delta, n, inside, SPEC: tl.constexpr):
    """B [BN, padded rank] of the group's columns n; inside: which of them exist."""
    i = tl.arange(0, SPEC[2])
    seen = inside[:, None] & (i < SPEC[1])[None, :]
    return tl.load(delta[11] + n[:, None] * SPEC[1] + i[None, :], mask=seen, other=0.0)


@triton.jit
def fetch_y(y, y_row, rows, live, n, inside):
    """y [BT, BN], as stored."""
    at = y + rows[:, None] * y_row + n[None, :]
    return tl.load(at, mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit
def fetch_columns(vector, n, inside, GIVEN: tl.constexpr):
    """A bias or weight at columns n, float32 [BN]; zeros if there is none."""
    if GIVEN:
        return tl.load(vector + n, mask=inside, other=0.0).to(tl.float32)
    else:
        return n * 0.0


@triton.jit
def fetch_sums(squares, rows, live, SUMS: tl.constexpr):
    """Partial sums of squares [BT, SUMS] of a norm put off. squares: (sums, how many, width, eps)."""
    if SUMS > 0:
        p = tl.arange(0, SUMS)
        at = squares[0] + rows[:, None] * squares[1] + p[None, :]
        return tl.load(at, mask=live[:, None] & (p < squares[1])[None, :], other=0.0)
    else:
        return rows[:, None] * 0.0


@triton.jit
def fetch_R(delta, segment, slot, SPEC: tl.constexpr):
    """R_slots[slot] [BT, padded rank, padded rank] of one segment, as stored; zeros for rows of slot 0."""
    if SPEC[0] == READY:
        return slot
    else:
        RANK: tl.constexpr = SPEC[1]
        i = tl.arange(0, SPEC[2])
        offset = pick(segment, delta[6], delta[7], delta[8])
        at = delta[3] + (slot * delta[4] + offset)[:, None, None] + i[None, :, None] * RANK + i[None, None, :]
        inside = i < RANK
        used = _used(segment, slot, SPEC)
        seen = used[:, None, None] & inside[None, :, None] & inside[None, None, :]
        return tl.load(at, mask=seen, other=0)


@triton.jit
def fetch_R_scale(delta, segment, slot, SPEC: tl.constexpr):
    """What int8 R is multiplied with, [BT]."""
    if SPEC[0] == INT8:
        module = pick(segment, delta[6], delta[7], delta[8]) // delta[5]
        used = _used(segment, slot, SPEC)
        return tl.load(delta[9] + slot * delta[10] + module, mask=used, other=0.0)
    else:
        return slot


@triton.jit
def late(x, delta, SPEC: tl.constexpr):
    """x as float32, behind a condition of which the compiler does not know that it holds always.

    Tensor cores have a layout of their own, and the compiler puts the exchange between threads that brings a
    loaded value into it directly behind the load, where it waits and keeps all later loads from starting. It
    cannot move the exchange above this.
    """
    if SPEC[0] == NONE:
        return x.to(tl.float32)
    else:
        return tl.where(delta[4] > 0, x, 0.0).to(tl.float32)  # the stride of a slot


@triton.jit
def apply_R(delta, R, R_scale, h, segment, slot, SPEC: tl.constexpr):
    """z [BT, padded rank] float32 of one segment: R @ h, zero for rows of slot 0 (where 0 * NaN is not)."""
    if SPEC[0] == READY:
        return late(h, delta, SPEC)
    else:
        z = tl.sum(R.to(tl.float32) * late(h, delta, SPEC)[:, None, :], axis=2)
        if SPEC[0] == INT8:
            z = z * R_scale[:, None]
        return tl.where(_used(segment, slot, SPEC)[:, None], z, 0.0)


@triton.jit
def _used(segment, slot, SPEC: tl.constexpr):
    column = pick(segment, SPEC[3], SPEC[4], SPEC[5])
    return tl.where(column >= 0, slot, 0) > 0


@triton.jit
def row_scale(sums, squares, SUMS: tl.constexpr):
    """rsqrt(mean square) [BT, 1] of a norm that was put off, 1 if none was."""
    if SUMS > 0:
        return tl.rsqrt(tl.sum(sums, axis=1) / squares[2] + squares[3])[:, None]
    else:
        return sums + 1.0


@triton.jit
def expand(delta, z, B, SPEC: tl.constexpr, DOT: tl.constexpr):
    """z @ B^T, float32 [BT, BN]. DOT: by tensor cores, which want 16 rows; else by elements, one row."""
    if DOT:
        B = late(B, delta, SPEC).to(B.dtype)
        return tl.dot(z.to(B.dtype), tl.trans(B), input_precision="ieee")
    else:
        row = tl.reshape(z, [z.shape[1]])
        return tl.sum(B.to(tl.float32) * row[None, :], axis=1)[None, :]
