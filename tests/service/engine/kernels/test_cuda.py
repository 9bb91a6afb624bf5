"""The fused ops compiled, on a CUDA device, against the reference implementation, at sizes of real models.

bfloat16 is tested here only. Skipped without a device; run this on one before a release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from service.engine.kernels import (
    NO_MODULE,
    PLAIN_ADD,
    AddedDelta,
    GroupDelta,
    QKVShape,
    ResidualAdd,
    RowSquares,
    ops_for,
)
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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPS: ModuleType = ops_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
QKV = QKVShape(num_heads=8, num_kv_heads=2, head_dim=128, rotary_dim=128)
QKV_WIDTHS = (1024, 256, 256)
GLU_WIDTH, ROW_WIDTH = 1500, 4096

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: On both sides of every border of the tiling table.
TOKENS = (1, 3, 4, 5, 17, 64, 65, 256, 257, 512, 513, 1100)
CASES = [
    *(Case(num_tokens, 16, dtype=torch.bfloat16, device="cuda") for num_tokens in TOKENS),
    *(
        Case(num_tokens, rank, "distinct", torch.bfloat16, device="cuda")
        for num_tokens in (3, 33)
        for rank in (2, 8, 24, 48, 128)
    ),
    *(
        Case(num_tokens, rank, "distinct", dtype, device="cuda")
        for num_tokens in (3, 33)
        for rank in (16, 64)
        for dtype in DTYPES
    ),
    *(Case(33, 16, popularity, torch.bfloat16, device="cuda") for popularity in (*POPULARITIES, "runs")),
    *(Case(600, rank, "runs", torch.bfloat16, device="cuda") for rank in (16, 64, 128)),
    *(
        Case(num_tokens, rank, "zipf", torch.bfloat16, torch.int8, "cuda")
        for num_tokens in (3, 33, 600)
        for rank in (16, 64)
    ),
]
ALL = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """The same numbers in every run, and a reference in float32 without TF32."""
    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@ALL
def test_qkv_rope(case: Case) -> None:
    check_qkv_rope(OPS, case, QKV, make_factors(case, QKV_WIDTHS, (4, 0, 2)), case.squares(500, 64))


@ALL
def test_glu(case: Case) -> None:
    check_glu(OPS, case, GLU_WIDTH, "silu", make_factors(case, (GLU_WIDTH, GLU_WIDTH), (1, 3)))


@ALL
def test_add_rms_norm(case: Case) -> None:
    factors = make_factors(case, (ROW_WIDTH,), (2,))
    check_add_rms_norm(OPS, case, case.norm(ROW_WIDTH), factors, width=ROW_WIDTH)


@ALL
def test_add_residual(case: Case) -> None:
    factors = make_factors(case, (ROW_WIDTH,), (2,))
    check_add_residual(OPS, case, case.norm(ROW_WIDTH), factors, PLAIN_ADD, width=ROW_WIDTH)


@ALL
def test_add_deltas(case: Case) -> None:
    check_add_deltas(OPS, [case, replace(case, rank=6, R_dtype=torch.float32)], (400, 330, 70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_tokens", [2, 33])
def test_heads_of_all_sizes(num_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    case = Case(num_tokens, 16, dtype=dtype, device="cuda")
    norm = case.norm(head_dim, plus_one=True)
    for rotary_dim in (head_dim, head_dim // 2, *([0] if head_dim == 64 else [])):
        shape = QKVShape(4, 2, head_dim, rotary_dim, case.random(8 * head_dim), norm, norm)
        widths = (4 * head_dim, 2 * head_dim, 2 * head_dim)
        check_qkv_rope(OPS, case, shape, make_factors(case, widths, (3, NO_MODULE, 1)), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [3, 33, 300])
@pytest.mark.parametrize("rank", [8, 32])
def test_ways_of_adding(rank: int, num_tokens: int, dtype: torch.dtype) -> None:
    case = Case(num_tokens, rank, dtype=dtype, device="cuda")
    norm = case.norm(2304, plus_one=True)
    for how in (ResidualAdd(post=norm), ResidualAdd(bias=case.random(2304), multiplier=0.25)):
        for factors in (None, make_factors(case, (2304,), (0,))):
            check_add_rms_norm(OPS, case, norm, factors, how, width=2304)
            check_add_rms_norm(OPS, case, None, factors, how, width=2304)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("num_tokens", [1, 32])
def test_a_captured_graph_follows_the_slots(num_tokens: int, rank: int) -> None:
    """The slots of a replay are those in the static buffer at that time, not those of the capture."""
    case = Case(num_tokens, rank, "distinct", torch.bfloat16, device="cuda")
    down, gate_up = make_factors(case, (512,), (2,)), make_factors(case, (700, 700), (0, 1))
    slots = torch.zeros(num_tokens, dtype=torch.int64, device="cuda")
    y, wide, h = (case.random(num_tokens, width) for width in (512 + rank, 1400 + 2 * rank, 2 * rank))
    start = case.random(num_tokens, 512)
    residual, norm = start.clone(), case.norm(512)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        residual.copy_(start)
        x, squares = OPS.add_residual(y, residual, norm, GroupDelta(down, slots))
        out = OPS.glu(wide, 700, "silu", GroupDelta(gate_up, slots), squares=squares)
        added = OPS.add_deltas(wide.clone(), [AddedDelta(gate_up, slots, h)])
        return x, out, added

    run()  # compiles
    captured = _capture(run)
    for popularity in ("distinct", "identical", "none"):
        slots.copy_(replace(case, popularity=popularity).token_slots)
        results = [part.clone() for part in captured()]
        for actual, expected in zip(results, run(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_token_does_not_see_its_neighbours() -> None:
    """The result of a token is bitwise the same whatever the other tokens of a batch of the same size are."""
    case = Case(64, 16, "distinct", torch.bfloat16, device="cuda")
    factors = make_factors(case, (ROW_WIDTH,), (2,))
    y, residual = case.random(64, ROW_WIDTH + 16), case.random(64, ROW_WIDTH)
    norm, slots = case.norm(ROW_WIDTH), case.token_slots
    results = []
    for others in (slots, torch.where(torch.arange(64, device="cuda") == 5, slots, 0)):
        x, squares = OPS.add_residual(y, residual.clone(), norm, GroupDelta(factors, others))
        assert isinstance(squares, RowSquares)
        results.append((x[5], squares.sums[5]))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def _capture(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay
