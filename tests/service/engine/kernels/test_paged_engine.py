"""A whole engine over the paged attention kernels, interpreted, against the oracle."""

from __future__ import annotations

import pytest
import torch

from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from tests.service.engine.driver import Driver
from tests.service.engine.models import family
from tests.service.engine.test_exactness import assert_exact, cases, run

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted there")
def test_an_engine_on_the_kernels_is_exact() -> None:
    served = family("micro")
    config = EngineConfig(
        num_blocks=64,
        block_size=8,
        num_slots=8,
        max_batch_seqs=16,
        max_batch_tokens=24,
        attention="triton",
        decode_graphs="static",
    )
    engine = Engine(served.base, config)
    try:
        engine.add_basis(served.basis)
        driver = Driver(engine, served.adapters, {})
        all_cases = cases(served)
        assert_exact(served, all_cases, run(driver, all_cases))
        assert_exact(served, all_cases[3:], run(driver, all_cases[3:]))  # this time from the prefix cache
    finally:
        engine.close()
