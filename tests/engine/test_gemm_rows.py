"""How many rows fused weights have."""

from __future__ import annotations

import pytest
import torch

from service.engine.fused import gemm_rows
from service.engine.fused.gemm_rows import RowPlan, plan_rows


def test_rows_by_the_number_of_tokens() -> None:
    plan = RowPlan((1, 32, 256), (4112, 4224, 4128))

    assert plan.max_rows == 4224
    assert [plan.rows_for(n) for n in (1, 2, 32, 33, 256, 257, 5000)] == [
        *(4112, 4224, 4224, 4128),
        *(4128, 4128, 4128),
    ]


@pytest.mark.parametrize("num_rows", [1, 8, 52, 211])
def test_without_a_device_only_aligned(num_rows: int) -> None:
    plan = plan_rows(num_rows, torch.empty(3, 48))

    assert num_rows <= plan.max_rows < num_rows + 8
    assert plan.max_rows % 8 == 0
    assert plan.rows_for(1) == plan.rows_for(10_000) == plan.max_rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_timed_rows_on_cuda() -> None:
    like = torch.empty(1, 4096, device="cuda", dtype=torch.bfloat16)

    plan = plan_rows(4096 + 16, like)

    assert all(4112 <= rows <= 4112 + 256 for rows in plan.rows)
    assert plan.points[-1] >= 2048
    assert plan_rows(4096 + 16, like) is plan, "timed once a process"
    assert plan_rows(40, like).rows == (40,), "small weights are not timed"
    assert gemm_rows.plan_rows(4110, like).rows_for(1) >= 4112
