"""The same exactness on a CUDA device. Skipped where there is none; run there before a release."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.engine.driver import Driver
from tests.engine.models import FAMILIES, Served, family
from tests.engine.test_exactness import assert_exact, cases, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=FAMILIES)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """On the device, without TF32: the oracle's float32 must be float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield family(request.param, "cuda")
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    "config",
    [{}, {"max_batch_tokens": 5}, {"num_blocks": 10, "max_batch_tokens": 16}],
    ids=["together", "chunked", "preempted"],
)
def test_exactness_on_cuda(served: Served, start: Callable[..., Driver], config: dict[str, int]) -> None:
    all_cases = cases(served)
    driver = start(served, **config)

    assert_exact(served, all_cases, run(driver, all_cases))
    if "num_blocks" not in config:
        assert_exact(served, all_cases, run(driver, all_cases))  # now from the prefix cache


def test_memory_by_kind_adds_up_to_the_device(start: Callable[..., Driver]) -> None:
    served = family("tiny", "cuda")
    driver = start(served)
    run(driver, cases(served))

    memory = driver.engine.stats().memory_bytes

    free, total = torch.cuda.mem_get_info()
    assert sum(memory.values()) == pytest.approx(total, rel=0.01), memory
    assert memory["free"] == pytest.approx(free, rel=0.01)
