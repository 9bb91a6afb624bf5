# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
"""Device functions that the kernels share: R for a tile of tokens, B for a tile of columns, the deferred
norm.

The functions called `fetch_*` start loads, the others wait for the loaded values, and every kernel calls them
in this order. First it loads what no kernel of the step writes: slots, weights, B, and R, which comes last
because its address depends on the slot. Then it calls `wait_for_inputs`, and loads what the kernels before it
have written. At few tokens an op takes as long as its chain of loads (0.3 to 0.7 µs each), and a kernel that
is launched early completes the first part of the chain while the GEMM before it still runs. For the same
reason loaded values go through `late` before they meet the product with B.

A kernel gets the description of a delta as one tuple `delta` of run-time values

    (h, h_row, slots, R, R_slot, R_module, offset0, offset1, offset2, scales, scales_row, B)

    h: the first h column of row 0, and h_row its row stride; offset_i: where the R of segment i begins within
    a slot (module * R_module); scales [S, M], for int8; B [N, rank]

and one tuple SPEC of constants (kind, rank, padded rank, column0, column1, column2, is_early)

    kind: how z is obtained, see below. column_i: the h block of segment i, -1 if it is no target module.
    is_early: whether the kernel is launched before its inputs exist (programmatic dependent launch).

The tuple holds offsets rather than module indices because Triton compiles a kernel again for arguments that
are multiples of 16: offsets always are, module indices only sometimes.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: Kinds of a delta: none; z is there already in place of h, one block per segment; R as floats; R as int8.
NONE = tl.constexpr(0)
READY = tl.constexpr(1)
FLOAT = tl.constexpr(2)
INT8 = tl.constexpr(3)


@triton.jit
def pick(segment, first, second, third):
    """The value of three that belongs to the segment."""
    return tl.where(segment == 0, first, tl.where(segment == 1, second, third))


@triton.jit
def wait_for_inputs(SPEC: tl.constexpr):
    """In a kernel that was launched early, wait until the kernels before it have ended, and let the next one
    begin.

    Only what was written before the last kernel that was not launched early may be read before this call:
    slots and weights, but not residuals.
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
    """h [BT, padded rank] of one segment, or z if the kind is READY. rows: int64 [BT]; live: which rows
    exist."""
    i = tl.arange(0, SPEC[2])
    column = segment + 0 if SPEC[0] == READY else pick(segment, SPEC[3], SPEC[4], SPEC[5])
    seen = live[:, None] & (i < tl.where(column >= 0, SPEC[1], 0))[None, :]
    at = delta[0] + rows[:, None] * delta[1] + column * SPEC[1] + i[None, :]
    return tl.load(at, mask=seen, other=0.0)


@triton.jit
def fetch_B(delta, n, inside, SPEC: tl.constexpr):
    """B [BN, padded rank] of the columns n of the group. inside: which columns exist."""
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
    """Partial sums of squares [BT, SUMS] of a deferred norm. squares: (sums, their number, width, eps)."""
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
    """The factor of an int8 R, [BT]."""
    if SPEC[0] == INT8:
        module = pick(segment, delta[6], delta[7], delta[8]) // delta[5]
        used = _used(segment, slot, SPEC)
        return tl.load(delta[9] + slot * delta[10] + module, mask=used, other=0.0)
    else:
        return slot


@triton.jit
def late(x, delta, SPEC: tl.constexpr):
    """x as float32, behind a condition that always holds, which the compiler cannot know.

    Tensor cores have a register layout of their own. The compiler places the exchange between threads that
    brings a loaded value into this layout directly behind the load, where it waits and keeps all later loads
    from starting. It cannot move the exchange above this condition.
    """
    if SPEC[0] == NONE:
        return x.to(tl.float32)
    else:
        return tl.where(delta[4] > 0, x, 0.0).to(tl.float32)  # the stride of a slot


@triton.jit
def apply_R(delta, R, R_scale, h, segment, slot, SPEC: tl.constexpr):
    """z [BT, padded rank] float32 of one segment: R @ h; zero for rows of slot 0 (0 * NaN would not be)."""
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
    """rsqrt(mean square) [BT, 1] of a deferred norm; 1 if there is none."""
    if SUMS > 0:
        return tl.rsqrt(tl.sum(sums, axis=1) / squares[2] + squares[3])[:, None]
    else:
        return sums + 1.0


@triton.jit
def expand(delta, z, B, SPEC: tl.constexpr, DOT: tl.constexpr):
    """z @ B^T, float32 [BT, BN]. DOT: by tensor cores, which need 16 rows; else element by element, one
    row."""
    if DOT:
        B = late(B, delta, SPEC).to(B.dtype)
        return tl.dot(z.to(B.dtype), tl.trans(B), input_precision="ieee")
    else:
        row = tl.reshape(z, [z.shape[1]])
        return tl.sum(B.to(tl.float32) * row[None, :], axis=1)[None, :]
