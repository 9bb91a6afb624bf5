"""The engine with Triton's attention, interpreted: tables on the device, tiles, padded shapes. Memory that
nobody has written is NaN, because rows and tiles of padding may hold anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from service.engine.wire.messages import SamplingParams
from tests.service.engine.driver import Driver
from tests.service.engine.models import family


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill tensors that are allocated and not initialised with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
def test_says_what_the_merged_model_says() -> None:
    served = family("gemma2")  # windows and soft caps
    config = EngineConfig(
        num_blocks=14, block_size=8, num_slots=4, max_batch_seqs=6, max_batch_tokens=16, attention="triton",
        decode_graphs="static", lookahead="on",
    )  # fmt: skip
    engine = Engine(served.base, config)
    engine.add_basis(served.basis)
    driver = Driver(engine, served.adapters)
    cases = list(zip([*served.refs[:2], None], served.prompts(19, 3, 9), strict=True))
    sampling = SamplingParams(max_tokens=5, temperature=0.0, logprobs=0)
    answers = [driver.submit(prompt, sampling, ref) for ref, prompt in cases]
    driver.run()
    steps = engine.runner.static_steps
    engine.close()

    assert steps is not None
    assert {shape.is_mixed for shape in steps.shapes} == {True, False}

    for (ref, prompt), answer in zip(cases, answers, strict=True):
        tokens, logprobs = served.oracle(ref, prompt, 5)
        assert answer.token_ids == tokens
        assert [report.logprob for report in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)
