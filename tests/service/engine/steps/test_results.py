"""The results of a step by chunk, with and without the short cut for steps that only sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from service.engine.sampling.sampler import make_generator
from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.request import PENDING, EngineRequest
from service.engine.steps.batch import SampledTokens, find_sources
from service.engine.steps.results import PendingResults, StepLogits
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.formats.adapter_ref import AdapterRef

CPU = torch.device("cpu")
V = 11
NO_TARGETS = torch.empty(0, dtype=torch.int64)


def make_sequence(prompt: list[int], adapter: AdapterRef | None = None, **sampling: Any) -> EngineRequest:
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    request = GenerationRequest("r", "t", prompt, params, adapter)
    return EngineRequest(request, 0, b"", make_generator(params, CPU))


def decode(request: EngineRequest) -> Chunk:
    return Chunk(request, request.num_tokens - 1, 1)


def test_tokens_and_nan_by_chunk() -> None:
    plan = StepPlan([decode(make_sequence([1, 2])), Chunk(make_sequence([1, 2, 3]), 0, 2),
                     Chunk(make_sequence([4, 5]), 0, 2), Chunk(make_sequence([6, 7]), 0, 2)])  # fmt: skip
    logits = torch.zeros(3, V)
    logits[0, 4] = logits[1, 9] = logits[2, 5] = 1
    logits[1, 0] = float("nan")

    outcome = PendingResults(plan, StepLogits(logits), NO_TARGETS).collect()

    assert [outcome.token_ids[index] for index in (0, 1, 3)] == [4, None, 5]
    assert outcome.not_finite == {2}
    assert not outcome.logprobs
    assert not outcome.prompt_logprobs


def test_log_probabilities_belong_to_their_chunks() -> None:
    scored = make_sequence([1, 2, 3], prompt_logprobs=0)
    plan = StepPlan([decode(make_sequence([1, 2])), decode(make_sequence([3], logprobs=2)),
                     Chunk(scored, 0, 3)])  # fmt: skip
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([2, 3])

    results = PendingResults(plan, StepLogits(logits), targets)
    outcome = results.collect()

    assert outcome.token_ids == logits[:3].argmax(-1).tolist() == results.tokens.tolist()
    assert [(index, report.token_id) for index, report in outcome.logprobs.items()] == [
        (1, outcome.token_ids[1])
    ]
    expected = logits.log_softmax(-1)[[3, 4], targets].tolist()
    assert [report.logprob for report in outcome.prompt_logprobs[2]] == pytest.approx(expected)
    assert list(outcome.prompt_logprobs) == [2]


def test_a_prompt_that_is_not_finite_fails_its_own_chunk() -> None:
    plan = StepPlan([decode(make_sequence([1, 2])), Chunk(make_sequence([1, 2, 3], prompt_logprobs=0), 0, 3)])
    logits = torch.zeros(4, V)
    logits[3, 2] = float("inf")
    outcome = PendingResults(plan, StepLogits(logits), torch.tensor([2, 3])).collect()
    assert outcome.not_finite == {1}


def test_a_plain_step_takes_the_largest_that_are_known_already() -> None:
    plan = StepPlan([decode(make_sequence([1, 2])) for _ in range(2)])
    step = StepLogits(torch.zeros(2, V), torch.tensor([7, 8]), torch.tensor([True, False]))
    results = PendingResults(plan, step, NO_TARGETS)
    assert results.tokens.tolist() == results.collect().token_ids == [7, 8]
    assert results.collect().not_finite == {1}


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 0},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"presence_penalty": 0.5},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 2, "stop_token_ids": (4,)},
    ],
    ids=str,
)
def test_what_asks_for_more_is_not_plain(sampling: dict[str, Any]) -> None:
    plain, other = make_sequence([1, 2], stop_token_ids=(4,)), make_sequence([1, 2], **sampling)
    assert StepPlan([decode(plain)]).is_plain
    assert not StepPlan([decode(plain), decode(other)]).is_plain
    assert StepPlan([decode(plain), decode(other)]).is_decode
    assert not StepPlan([Chunk(plain, 0, 1)]).is_plain, "does not sample"


def test_what_decodes_only() -> None:
    request = make_sequence([1, 2, 3])
    assert StepPlan([decode(request)]).is_decode
    assert not StepPlan([Chunk(request, 0, 1)]).is_decode
    assert not StepPlan([decode(request), Chunk(make_sequence([1, 2]), 0, 2)]).is_decode
    assert not StepPlan([decode(make_sequence([1], max_tokens=0))]).is_decode, "has had its last token"
    assert not StepPlan([Chunk(make_sequence([1, 2], prompt_logprobs=0), 0, 1)]).is_decode


def test_distinct_models_and_bases_of_a_step() -> None:
    refs = [AdapterRef("t", "a", 1, "x"), AdapterRef("t", "a", 1, "x"), AdapterRef("t", "a", 2, "x"), None]
    plan = StepPlan([decode(make_sequence([1, 2], ref)) for ref in refs])
    assert plan.num_distinct == 3
    assert plan.basis_ids == {"x", None}


def test_pending_tokens_come_from_the_row_that_sampled_them() -> None:
    first, second, third = (make_sequence([1, 2]) for _ in range(3))
    for request in (first, second, third):
        request.token_ids.append(PENDING)
    tokens = torch.tensor([5, 6, 7])
    sampled = SampledTokens(tokens, [first, second, third])

    def ids(*chunks: Chunk) -> list[int]:
        known = [chunk.request.token_ids[chunk.start : chunk.end] for chunk in chunks]
        sources = find_sources(chunks, sampled)
        assert sources is not None
        assert sources.rows.dtype == np.int64
        flat = torch.tensor([token for part in known for token in part])
        return sources.fill_in(flat, torch.from_numpy(sources.rows)).tolist()  # type: ignore[no-any-return]

    assert ids(decode(first), decode(second), decode(third)) == [5, 6, 7]
    assert ids(decode(third), decode(first)) == [7, 5]
    assert ids(decode(second), Chunk(third, 0, 3)) == [6, 1, 2, 7]
    assert ids(decode(make_sequence([9])), decode(second)) == [9, 6]
    assert find_sources([Chunk(first, 0, 2), decode(make_sequence([9]))], None) is None
