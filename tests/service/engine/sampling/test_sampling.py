"""The choice of tokens, against slow references and whatever the other rows of the batch are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.engine.sampling.logprobs import token_logprobs
from service.engine.sampling.sampler import apply_rules, make_generator, sample
from service.engine.scheduling.request import EngineRequest
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tests.service.engine.driver import Driver
from tests.service.engine.models import Served

CPU = torch.device("cpu")
V = 13


def make_sequence(prompt: list[int], output: list[int], **sampling: Any) -> EngineRequest:
    params = SamplingParams(**sampling)
    request = EngineRequest(GenerationRequest("r", "t", prompt, params), 0, b"", make_generator(params, CPU))
    for token in output:
        request.append(token)
    return request


def slow_rules(logits: list[float], prompt: list[int], output: list[int], s: SamplingParams) -> list[float]:
    """The rules, applied one token at a time."""
    result = []
    for token, logit in enumerate(logits):
        if token in prompt or token in output:
            logit = logit / s.repetition_penalty if logit > 0 else logit * s.repetition_penalty
        logit -= s.frequency_penalty * output.count(token)
        logit -= s.presence_penalty * (token in output)
        logit += s.logit_bias.get(token, 0.0)
        if len(output) < s.min_tokens and token in s.stop_token_ids:
            logit = -math.inf
        result.append(logit)
    return result


def slow_probabilities(logits: list[float], s: SamplingParams) -> dict[int, float]:
    """The probabilities with which tokens are drawn: temperature, then top_k, top_p and min_p, by sorting and
    adding up."""
    weights = [math.exp((logit - max(logits)) / s.temperature) for logit in logits]
    ranked = sorted(
        ((w / sum(weights), token) for token, w in enumerate(weights)), key=lambda p: (-p[0], p[1])
    )
    if s.top_k > 0:
        ranked = ranked[: s.top_k]
    if s.top_p < 1:
        total, mass, kept = sum(p for p, _ in ranked), 0.0, []
        for p, token in ranked:
            if kept and mass >= s.top_p * total:
                break
            kept.append((p, token))
            mass += p
        ranked = kept
    ranked = [(p, token) for p, token in ranked if p >= s.min_p * ranked[0][0]]
    total = sum(p for p, _ in ranked)
    return {token: p / total for p, token in ranked}


tokens = st.lists(st.integers(0, V - 1), max_size=8)


@given(
    logits=st.lists(st.floats(-5, 5), min_size=V, max_size=V),
    prompt=tokens.filter(bool),
    output=tokens,
    rules=st.fixed_dictionaries(
        {
            "repetition_penalty": st.sampled_from([1.0, 0.8, 1.7]),
            "frequency_penalty": st.sampled_from([0.0, 0.5, -1.0]),
            "presence_penalty": st.sampled_from([0.0, 1.5, -0.3]),
            "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-3, 3), max_size=3),
            "min_tokens": st.integers(0, 8),
            "stop_token_ids": st.lists(st.integers(0, V + 3), max_size=3).map(tuple),
        }
    ),
)
def test_rules_match_the_slow_reference(
    logits: list[float], prompt: list[int], output: list[int], rules: dict[str, Any]
) -> None:
    request = make_sequence(prompt, output, **rules)
    plain = make_sequence(prompt, output)
    row = torch.tensor(logits)
    ruled = apply_rules(torch.stack([row, row]), [request, plain])

    expected = torch.tensor(slow_rules(logits, prompt, output, request.sampling))
    torch.testing.assert_close(ruled[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ruled[1], row), "a rule reached another row"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 500},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 1.5, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_slow_reference(params: dict[str, Any]) -> None:
    num_draws = 4000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 2
    request = make_sequence([1], [], seed=11, **params)
    drawn: Counter[int] = Counter()
    for _ in range(
        num_draws // 50
    ):  # one generator, so rows of one call and consecutive calls are equivalent draws
        drawn.update(sample(logits.expand(50, V), [request] * 50).tolist())

    expected = slow_probabilities(logits.tolist(), request.sampling)
    assert drawn.keys() <= expected.keys(), "a token was drawn that the parameters exclude"
    for token, p in expected.items():
        sigma = math.sqrt(num_draws * p * (1 - p))
        assert abs(drawn[token] - num_draws * p) <= 5 * sigma + 1e-9, f"token {token}"


def test_temperature_0_is_greedy_beside_rows_that_draw() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    requests = [make_sequence([1], [], temperature=t, seed=2) for t in (0.0, 5.0, 1e-30)]
    for _ in range(20):
        chosen = sample(logits, requests).tolist()
        assert (chosen[0], chosen[2]) == (int(logits[0].argmax()), int(logits[2].argmax()))


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    kinds = [
        {"temperature": 1.0, "seed": 3, "top_p": 0.9},
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 4},
    ]

    def draw(poisoned: Tensor) -> list[int]:
        return sample(poisoned, [make_sequence([1], [2], **kind) for kind in kinds]).tolist()

    bad = logits.clone()
    bad[1] = torch.nan
    assert draw(bad)[::2] == draw(logits)[::2]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.randn(70, V)  # more rows than are converted to float32 at once
    chosen = torch.randint(V, (70,))
    reports = token_logprobs(logits, chosen, [index % 4 for index in range(70)])

    expected = logits.log_softmax(-1)
    for index, report in enumerate(reports):
        assert report.token_id == int(chosen[index])
        assert report.logprob == pytest.approx(float(expected[index, chosen[index]]), abs=1e-6)
        ranked = expected[index].sort(descending=True)
        assert [token for token, _ in report.top] == ranked.indices[: index % 4].tolist()
        assert [logprob for _, logprob in report.top] == pytest.approx(ranked.values[: index % 4].tolist())


DRAWING = SamplingParams(max_tokens=10, temperature=1.2, top_p=0.95, top_k=50, seed=123, logprobs=2)


def test_a_seeded_request_does_not_depend_on_its_company(llama: Served, start: Callable[..., Driver]) -> None:
    ref, prompts = llama.refs[0], llama.prompts(19, 7, 30, 12)
    alone = start(llama)
    expected = alone.submit(prompts[0], DRAWING, ref)
    alone.run()
    alone.engine.close()

    crowded = start(llama, num_blocks=16, max_batch_tokens=12)
    company = [
        SamplingParams(max_tokens=14, temperature=t, seed=s)
        for t, s in ((0.0, None), (1.0, 123), (3.0, None))
    ]
    for params, prompt in zip(company, prompts[1:], strict=True):
        crowded.submit(prompt, params, llama.refs[1])
    crowded.fetch()
    crowded.step()
    answers = [crowded.submit(prompts[0], DRAWING, ref) for _ in range(2)]
    crowded.run()

    assert crowded.engine.stats().preemptions_total > 0
    for answer in answers:
        assert answer.token_ids == expected.token_ids
        for report, other in zip(answer.logprobs, expected.logprobs, strict=True):
            assert report.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_unseeded_requests_differ(llama: Served, start: Callable[..., Driver]) -> None:
    driver = start(llama)
    params = SamplingParams(max_tokens=12, temperature=2.0)
    answers = [driver.submit(llama.prompts(5)[0], params) for _ in range(4)]
    driver.run()
    assert len({tuple(answer.token_ids) for answer in answers}) == 4


def test_rows_without_a_seed_draw_together_and_independently() -> None:
    """One call draws for all of them, and seeded rows among them draw the same as alone."""
    logits = torch.zeros(6, V)
    together = [make_sequence([1], [], temperature=1.0, seed=seed) for seed in (None, 7, None, None, 7, None)]
    assert together[0].generator is together[2].generator
    assert together[1].generator is not together[4].generator
    rounds = torch.stack([sample(logits, together) for _ in range(400)])  # [rounds, rows]

    alone = make_sequence([1], [], temperature=1.0, seed=7)
    expected = torch.stack([sample(logits[:1], [alone])[0] for _ in range(400)])
    assert torch.equal(rounds[:, 1], expected)
    assert torch.equal(rounds[:, 4], expected)
    for row in (0, 2, 3, 5):
        counts = torch.bincount(rounds[:, row], minlength=V)
        assert counts.min() > 5, "every token of an even distribution comes up: 31 times on average"
    same = (rounds[:, 0] == rounds[:, 2]).float().mean()
    assert same < 0.25, "rows are as unlike as chance makes them: 1 in 13"
