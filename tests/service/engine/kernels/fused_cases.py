"""Inputs for the fused ops, with NaN wherever an op must not read, and the checks that all tests share.

A check runs an op and the reference implementation on copies of the same inputs and compares the results, and
with them the whole buffers that hold inputs and outputs, so that a write beyond the T rows shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from service.engine.kernels import (
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
    reference,
    stack_factors,
)
from tests.popularity import make_token_slots

NAN = float("nan")
#: Largest difference that rounding explains, relative and absolute: outputs are of the order of 1. float16
#: and bfloat16 also round z before the tensor cores.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
NUM_MODULES = 5
BLOCK_SIZE = 4
#: Rows and columns beyond those that an op gets.
EXTRA_ROWS, EXTRA_COLUMNS = 2, 3


@dataclass(frozen=True)
class Case:
    """The parameters from which the shapes of a test follow."""

    num_tokens: int = 17
    rank: int = 8
    popularity: str = "zipf"
    dtype: torch.dtype = torch.float32
    R_dtype: torch.dtype | None = None  # None: as dtype
    device: str = "cpu"

    @property
    def token_slots(self) -> Tensor:
        if self.popularity == "runs":  # as in a prefill: long runs, a short one, base rows
            slots = torch.ones(self.num_tokens, dtype=torch.int64)
            slots[-20:-10], slots[-10:] = 2, 0
            return slots.to(self.device)
        return make_token_slots(self.popularity, self.num_tokens).to(self.device)

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.R_dtype) if dtype]
        return f"{self.num_tokens} tokens, rank {self.rank}, {self.popularity}, {', R '.join(names)}"

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.device, self.dtype)

    def norm(self, width: int, *, plus_one: bool = False) -> Norm:
        weight = torch.randn(width) / 4 + (0 if plus_one else 1)
        return Norm(weight.to(self.device, self.dtype), 1e-5, plus_one)

    def squares(self, width: int, num_sums: int = 3) -> RowSquares:
        sums = torch.rand(self.num_tokens, num_sums) * width / num_sums + width / 4
        return RowSquares(sums.to(self.device), width, 1e-5)


def make_factors(case: Case, widths: Sequence[int], modules: Sequence[int]) -> GroupFactors:
    """Random factors. The R of slot 0 and of modules outside the group is NaN (with int8, its scale)."""
    rank, num_slots = case.rank, case.num_tokens + 1
    R = torch.randn(num_slots, NUM_MODULES, rank, rank) / math.sqrt(rank)
    unread = [m for m in range(NUM_MODULES) if m not in modules]
    scales = None
    if case.R_dtype == torch.int8:
        scales = R.abs().amax(dim=(2, 3)) / 127
        R = (R / scales[:, :, None, None]).round()
        scales[0] = scales[:, unread] = NAN
        scales = scales.to(case.device)
    else:
        R[0] = R[:, unread] = NAN
    B = [
        None if module == NO_MODULE else case.random(width, rank) / math.sqrt(rank)
        for width, module in zip(widths, modules, strict=True)
    ]
    return stack_factors(B, widths, modules, R.to(case.device, case.R_dtype or case.dtype), scales)


def make_rows(case: Case, width: int) -> Tensor:
    """Random numbers [T, width], a part of a larger buffer of NaN, see `buffer_of`."""
    buffer = torch.full((case.num_tokens + EXTRA_ROWS, width + EXTRA_COLUMNS), NAN)
    buffer[: case.num_tokens, :width] = torch.randn(case.num_tokens, width)
    return buffer.to(case.device, case.dtype)[: case.num_tokens, :width]


def make_y(case: Case, width: int, factors: GroupFactors | None) -> Tensor:
    """y [T, N + C * r] with NaN for the h of rows that use slot 0."""
    y = make_rows(case, width + (factors.h_width if factors is not None else 0))
    y[case.token_slots == 0, width:] = NAN
    return y


def buffer_of(rows: Tensor) -> Tensor:
    """The whole buffer of which a tensor is a part."""
    assert rows._base is not None
    return rows._base


def copy_of(rows: Tensor) -> Tensor:
    """The same part of a copy of the whole buffer."""
    return buffer_of(rows).clone()[: rows.shape[0], : rows.shape[1]]


def assert_same(case: Case, actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def with_delta(case: Case, factors: GroupFactors | None) -> GroupDelta | None:
    return None if factors is None else GroupDelta(factors, case.token_slots)


def check_qkv_rope(
    ops: ModuleType, case: Case, shape: QKVShape, factors: GroupFactors | None, squares: RowSquares | None
) -> None:
    """Compare queries, and whole pages that were NaN before."""
    y = make_y(case, shape.width, factors)
    T, half = case.num_tokens, shape.rotary_dim // 2
    places = torch.randperm(BLOCK_SIZE * (T + 1))[:T].to(case.device)
    angles = torch.rand(T, half).to(case.device)
    cos, sin = (torch.cat([part, part], dim=1) for part in (angles.cos(), angles.sin()))
    pages = torch.full((T + 1, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim), NAN)
    rows, for_reference = (
        StepRows(
            cos if half else None,
            sin if half else None,
            *(pages.to(case.device, case.dtype, copy=True) for _ in "KV"),
            places // BLOCK_SIZE,
            places % BLOCK_SIZE,
        )
        for _ in range(2)
    )
    before = buffer_of(y).clone()
    q = ops.qkv_rope(y, shape, rows, with_delta(case, factors), squares)
    expected = reference.qkv_rope(y, shape, for_reference, with_delta(case, factors), squares)
    assert not torch.isnan(expected).any()
    assert_same(case, q, expected)
    assert_same(case, rows.K, for_reference.K)
    assert_same(case, rows.V, for_reference.V)
    assert torch.equal(before.nan_to_num(7), buffer_of(y).nan_to_num(7)), "y is only read"


def check_glu(
    ops: ModuleType,
    case: Case,
    width: int,
    act: str,
    factors: GroupFactors | None,
    *,
    has_extras: bool = False,
) -> None:
    """has_extras: with a bias and a deferred norm."""
    y = make_y(case, 2 * width, factors)
    extras = {"bias": case.random(2 * width), "squares": case.squares(width)} if has_extras else {}
    delta = with_delta(case, factors)
    expected = reference.glu(y, width, act, delta, **extras)  # type: ignore[arg-type]
    assert not torch.isnan(expected).any()
    assert_same(case, ops.glu(y, width, act, delta, **extras), expected)


def check_add_rms_norm(
    ops: ModuleType,
    case: Case,
    norm: Norm | None,
    factors: GroupFactors | None,
    how: ResidualAdd = PLAIN_ADD,
    *,
    width: int,
) -> None:
    y = make_y(case, width, factors)
    residual, for_reference = _residuals(case, width)
    delta = with_delta(case, factors)
    expected = reference.add_rms_norm(copy_of(y), for_reference, norm, delta, how)
    assert not torch.isnan(expected).any()
    assert_same(case, ops.add_rms_norm(y, residual, norm, delta, how), expected)
    assert_same(case, buffer_of(residual), buffer_of(for_reference))


def check_add_residual(
    ops: ModuleType, case: Case, norm: Norm, factors: GroupFactors | None, how: ResidualAdd, *, width: int
) -> None:
    """x and the residual as the reference implementation has them, and x * rstd is what `add_rms_norm`
    returns."""
    y = make_y(case, width, factors)
    residual, for_reference = _residuals(case, width)
    delta = with_delta(case, factors)
    normed = reference.add_rms_norm(y, for_reference.clone(), norm, delta, how)
    expected, _ = reference.add_residual(y, for_reference, norm, delta, how)
    x, squares = ops.add_residual(y, residual, norm, delta, how)
    assert_same(case, x, expected)
    assert_same(case, buffer_of(residual), buffer_of(for_reference))
    rstd = torch.rsqrt(squares.sums.sum(1, keepdim=True) / squares.width + squares.eps)
    assert_same(case, x * rstd, normed)


def check_add_deltas(ops: ModuleType, cases: Sequence[Case], widths: Sequence[int]) -> None:
    """Check bases of different rank and dtype; every token belongs to at most one of them."""
    first = cases[0]
    owner = torch.randint(0, len(cases), (first.num_tokens,)).to(first.device)
    deltas = []
    for index, case in enumerate(cases):
        factors = make_factors(case, widths, range(len(widths)))
        slots = torch.where(owner == index, case.token_slots, 0)
        h = make_rows(case, factors.h_width)
        h[slots == 0] = NAN
        deltas.append(AddedDelta(factors, slots, h))
    y = make_rows(first, sum(widths) + 1)  # one column more than the group has
    for_reference = copy_of(y)
    reference.add_deltas(for_reference, deltas)
    assert ops.add_deltas(y, deltas) is y
    assert not torch.isnan(y).any()
    assert_same(first, buffer_of(y), buffer_of(for_reference))


def _residuals(case: Case, width: int) -> tuple[Tensor, Tensor]:
    """Two equal residuals [T, width], contiguous, each in a buffer with rows of NaN below."""
    buffer = torch.full((case.num_tokens + EXTRA_ROWS, width), NAN)
    buffer[: case.num_tokens] = torch.randn(case.num_tokens, width)
    buffer = buffer.to(case.device, case.dtype)
    return buffer.clone()[: case.num_tokens], buffer.clone()[: case.num_tokens]
