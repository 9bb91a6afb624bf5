"""Every fused op as an interpreted Triton kernel on the CPU against the reference implementation.

Only float32 and float16, because the interpreter computes with numpy, which has no bfloat16. See
`test_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from service.engine.kernels import NO_MODULE, PLAIN_ADD, GroupDelta, GroupFactors, QKVShape, ResidualAdd
from tests.popularity import POPULARITIES
from tests.service.engine.kernels.fused_cases import (
    Case,
    check_add_deltas,
    check_add_residual,
    check_add_rms_norm,
    check_glu,
    check_qkv_rope,
    make_factors,
)

QKV = QKVShape(num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=16)
QKV_WIDTHS = (32, 16, 16)
#: Wider than one tile of columns, and not a multiple of any.
GLU_WIDTH, ROW_WIDTH = 150, 150

#: Both ways of applying R (gathered, applied before) and B (element by element, tensor cores), padded and
#: exact.
RANKS = [
    Case(1, 16),
    Case(3, 2),
    Case(17, 4),
    Case(3, 128),
    Case(9, 48, dtype=torch.float16),
]
DTYPES = [
    Case(1, 24),
    Case(17, 16, dtype=torch.float16),
    Case(5, 64),
    Case(5, 8, R_dtype=torch.int8),
    Case(3, 32, R_dtype=torch.int8),
    Case(5, 16, dtype=torch.float16, R_dtype=torch.float32),
    Case(5, 16, dtype=torch.float32, R_dtype=torch.float16),
]
BY_POPULARITY = [Case(9, 8, popularity) for popularity in POPULARITIES]
ALL = pytest.mark.parametrize("case", RANKS + BY_POPULARITY, ids=str)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """The same numbers in every run, and NaN in memory that an op allocates until it is written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)


@ALL
def test_qkv_rope(interpreted: ModuleType, case: Case) -> None:
    check_qkv_rope(interpreted, case, QKV, make_factors(case, QKV_WIDTHS, (4, 0, 2)), None)


@ALL
def test_glu(interpreted: ModuleType, case: Case) -> None:
    check_glu(interpreted, case, GLU_WIDTH, "silu", make_factors(case, (GLU_WIDTH, GLU_WIDTH), (1, 3)))


@ALL
def test_add_rms_norm(interpreted: ModuleType, case: Case) -> None:
    factors = make_factors(case, (ROW_WIDTH,), (2,))
    check_add_rms_norm(interpreted, case, case.norm(ROW_WIDTH), factors, width=ROW_WIDTH)


@pytest.mark.parametrize("case", RANKS + DTYPES + BY_POPULARITY, ids=str)
def test_add_residual(interpreted: ModuleType, case: Case) -> None:
    factors = make_factors(case, (ROW_WIDTH,), (2,))
    check_add_residual(interpreted, case, case.norm(ROW_WIDTH), factors, PLAIN_ADD, width=ROW_WIDTH)


@ALL
def test_add_deltas_of_one_basis(interpreted: ModuleType, case: Case) -> None:
    check_add_deltas(interpreted, [case], (40, 33, 7))


@pytest.mark.parametrize(
    "shape",
    [
        replace(QKV, rotary_dim=0),
        replace(QKV, rotary_dim=10),
        replace(QKV, head_dim=24, rotary_dim=24),
    ],
    ids=["no positions", "partial", "odd head"],
)
@pytest.mark.parametrize("num_tokens", [2, 17])
def test_qkv_rope_of_other_heads(interpreted: ModuleType, shape: QKVShape, num_tokens: int) -> None:
    case = Case(num_tokens, 4)
    widths = (shape.num_heads * shape.head_dim, shape.head_dim, shape.head_dim)
    check_qkv_rope(interpreted, case, shape, make_factors(case, widths, (0, 1, 2)), None)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("which", ["q", "k", "qk"])
def test_qkv_rope_with_bias_norms_and_a_norm_put_off(
    interpreted: ModuleType, which: str, plus_one: bool
) -> None:
    case = Case(17, 8, dtype=torch.float16)
    q_norm, k_norm = (case.norm(16, plus_one=plus_one) if name in which else None for name in "qk")
    shape = replace(QKV, bias=case.random(QKV.width), q_norm=q_norm, k_norm=k_norm, rotary_dim=10)
    factors = make_factors(case, QKV_WIDTHS, (4, 0, 2))
    check_qkv_rope(interpreted, case, shape, factors, case.squares(50))


@pytest.mark.parametrize("rank", [8, 32])
def test_modules_without_a_delta(interpreted: ModuleType, rank: int) -> None:
    """q and v are targets and k is not, so y has no h for k."""
    case = Case(17, rank, "distinct")
    factors = make_factors(case, QKV_WIDTHS, (3, NO_MODULE, 1))
    assert factors.h_width == 2 * rank
    check_qkv_rope(interpreted, case, QKV, factors, None)


@pytest.mark.parametrize("rank", [8, 32])
def test_segments_of_one_module(interpreted: ModuleType, rank: int) -> None:
    """A projection that the model itself has fused has one h, one R, and three parts of B."""
    case = Case(17, rank, "distinct")
    parts = make_factors(case, QKV_WIDTHS, (2, 2, 2))
    factors = GroupFactors(QKV_WIDTHS, parts.B, parts.R_slots, (2, 2, 2), (0, 0, 0))
    assert factors.h_width == rank
    check_qkv_rope(interpreted, case, QKV, factors, None)


@pytest.mark.parametrize("num_tokens", [3, 17])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_glu_with_bias_and_a_norm_put_off(interpreted: ModuleType, act: str, num_tokens: int) -> None:
    case = Case(num_tokens, 8)
    factors = make_factors(case, (40, 40), (1, 3))
    check_glu(interpreted, case, 40, act, factors, has_extras=True)


@pytest.mark.parametrize(("num_tokens", "rank"), [(3, 0), (3, 8), (3, 32), (66, 8)])
@pytest.mark.parametrize("kind", ["plain", "bias", "post", "no norm"])
def test_ways_of_adding(interpreted: ModuleType, kind: str, num_tokens: int, rank: int) -> None:
    case = Case(num_tokens, max(rank, 1))
    factors = make_factors(case, (36,), (0,)) if rank else None
    norm = case.norm(36, plus_one=kind == "post")
    how = {
        "plain": PLAIN_ADD,
        "bias": ResidualAdd(bias=case.random(36), multiplier=0.25),
        "post": ResidualAdd(post=case.norm(36, plus_one=True)),
        "no norm": ResidualAdd(post=case.norm(36)),
    }[kind]
    check_add_rms_norm(interpreted, case, None if kind == "no norm" else norm, factors, how, width=36)
    if how.post is None:
        check_add_residual(interpreted, case, norm, factors, how, width=36)


def test_the_base_model_alone(interpreted: ModuleType) -> None:
    for num_tokens in (1, 18):
        case = Case(num_tokens, 8, dtype=torch.float16)
        check_qkv_rope(interpreted, case, QKV, None, case.squares(64))
        check_glu(interpreted, case, GLU_WIDTH, "silu", None, has_extras=True)


def test_many_tokens(interpreted: ModuleType) -> None:
    """In a prefill tiles have many tokens, and R is applied once per token, in tiles of one slot and mixed
    tiles."""
    for rank, R_dtype in ((16, None), (48, torch.int8)):
        case = Case(530, rank, "runs", R_dtype=R_dtype)
        check_add_residual(
            interpreted, case, case.norm(24), make_factors(case, (24,), (1,)), PLAIN_ADD, width=24
        )


@pytest.mark.parametrize("num_tokens", [3, 17])
def test_add_deltas_of_several_bases(interpreted: ModuleType, num_tokens: int) -> None:
    cases = [
        Case(num_tokens, 16),
        Case(num_tokens, 64, "distinct", R_dtype=torch.float16),
        Case(num_tokens, 6, "identical", R_dtype=torch.int8),
    ]
    check_add_deltas(interpreted, cases, (33, 9))


def test_rms_norm_of_a_part_of_y_in_place(interpreted: ModuleType) -> None:
    case = Case(7, 4)
    y = torch.randn(7, 50)
    norm = case.norm(20)
    expected = y.clone()
    part = expected[:, 10:30]
    part *= torch.rsqrt(part.square().mean(1, keepdim=True) + norm.eps) * norm.weight
    interpreted.rms_norm(y[:, 10:30], norm, y[:, 10:30])
    torch.testing.assert_close(y, expected)


def test_nothing_to_do(interpreted: ModuleType) -> None:
    case = Case(0, 8)
    norm = case.norm(36)
    assert interpreted.glu(torch.empty(0, 72), 36, "silu").shape == (0, 36)
    assert interpreted.rms_norm(torch.empty(0, 36), norm).shape == (0, 36)
    x, squares = interpreted.add_residual(torch.empty(0, 36), torch.empty(0, 36), norm)
    assert x.shape == (0, 36)
    assert len(squares.sums) == 0
    y = torch.randn(3, 36)
    assert torch.equal(interpreted.add_deltas(y.clone(), []), y)


def test_nan_in_one_slot_stays_there(interpreted: ModuleType) -> None:
    """With others in one tile, through tensor cores and element by element, with R gathered and applied
    before."""
    for num_tokens, rank in ((3, 8), (9, 8), (9, 32), (66, 8)):
        case = Case(num_tokens, rank, "distinct")
        factors = make_factors(case, (36,), (0,))
        factors.R_slots[2] = float("nan")
        y, residual = torch.randn(num_tokens, 36 + rank), torch.randn(num_tokens, 36)
        out = interpreted.add_rms_norm(y, residual, case.norm(36), GroupDelta(factors, case.token_slots))
        assert torch.equal(torch.isnan(out).any(1), case.token_slots == 2)
        assert torch.equal(torch.isnan(residual).any(1), case.token_slots == 2)
