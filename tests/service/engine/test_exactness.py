"""The oracle: a crowded engine gives the same output as the merged model run alone.

Five requests with different adapters, two of them with the same prompt and one without an adapter, must have
equal greedy tokens and log-probabilities within 1e-4, in whatever way the steps are cut.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tessera.formats.adapter_ref import AdapterRef
from tests.service.engine.driver import Answer, Driver
from tests.service.engine.models import Served

TOLERANCE = 1e-4
NUM_TOKENS = 12

Start = Callable[..., Driver]
Case = tuple[AdapterRef | None, list[int]]

both_paths = pytest.mark.parametrize("enable_fused", [True, False], ids=["fused", "generic"])


def cases(served: Served) -> list[Case]:
    a, b, c, d = served.refs
    short, long, middle, longest = served.prompts(5, 23, 17, 38)
    return [(a, short), (b, long), (None, middle), (c, longest), (d, long)]


def run(driver: Driver, all_cases: list[Case]) -> list[Answer]:
    answers = [driver.submit(prompt, adapter=ref) for ref, prompt in all_cases]
    driver.run()
    return answers


def assert_exact(served: Served, all_cases: list[Case], answers: list[Answer]) -> None:
    for (ref, prompt), answer in zip(all_cases, answers, strict=True):
        tokens, logprobs = served.oracle(ref, prompt, NUM_TOKENS)
        assert answer.token_ids == tokens, f"tokens of {ref}"
        got = [report.logprob for report in answer.logprobs]
        assert got == pytest.approx(logprobs, abs=TOLERANCE), f"log-probabilities of {ref}"
        assert answer.finish_reason == "length"


@both_paths
def test_five_requests_in_one_batch(served: Served, start: Start, enable_fused: bool) -> None:
    all_cases = cases(served)
    driver = start(served, enable_fused=enable_fused)
    answers = run(driver, all_cases)

    assert_exact(served, all_cases, answers)
    assert answers[0].outputs[-2].num_distinct == 5
    outputs = {tuple(answer.token_ids) for answer in answers}
    assert len(outputs) == 5, "adapters must matter, or this test shows nothing"


@pytest.mark.parametrize("max_batch_tokens", [5, 16])
def test_chunked_prefill(served: Served, start: Start, max_batch_tokens: int) -> None:
    all_cases = cases(served)
    driver = start(served, max_batch_tokens=max_batch_tokens)
    answers = run(driver, all_cases)

    assert_exact(served, all_cases, answers)
    assert driver.engine.stats().steps_total > NUM_TOKENS + 38 // max_batch_tokens


def test_prefix_cache_hits(served: Served, start: Start) -> None:
    all_cases = cases(served)
    driver = start(served)
    first = run(driver, all_cases)
    second = run(driver, all_cases)

    assert_exact(served, all_cases, first)
    assert_exact(served, all_cases, second)
    assert [answer.last.num_cached_tokens for answer in first] == [0] * 5
    assert [answer.last.num_cached_tokens for answer in second] == [0, 16, 16, 32, 16]


def test_blocks_are_shared_while_both_run(served: Served, start: Start) -> None:
    ref, prompt = served.refs[0], served.prompts(33)[0]
    driver = start(served)
    answers = [driver.submit(prompt, adapter=ref)]
    driver.fetch()
    driver.step()
    answers += [driver.submit(prompt, adapter=ref), driver.submit(prompt, adapter=served.refs[1])]
    driver.fetch()
    driver.step()
    first, same, other = (set(sequence.blocks) for sequence in driver.engine.scheduler.running)
    driver.run()

    assert len(first & same) == 4
    assert not (first | same) & other, "two adapters shared KV"
    assert_exact(served, [(ref, prompt), (ref, prompt), (served.refs[1], prompt)], answers)


@both_paths
def test_preemption(served: Served, start: Start, enable_fused: bool) -> None:
    all_cases = cases(served)
    driver = start(served, num_blocks=10, max_batch_tokens=16, enable_fused=enable_fused)
    answers = run(driver, all_cases)

    assert_exact(served, all_cases, answers)
    assert driver.engine.stats().preemptions_total > 0


def test_preemption_without_prefix_cache(served: Served, start: Start) -> None:
    all_cases = cases(served)
    driver = start(served, num_blocks=9, enable_prefix_cache=False)
    answers = run(driver, all_cases)

    assert_exact(served, all_cases, answers)
    assert driver.engine.stats().preemptions_total > 0
    assert driver.engine.stats().cached_prompt_tokens_total == 0


@both_paths
def test_two_bases_in_one_batch(served: Served, start: Start, enable_fused: bool) -> None:
    short, long = served.prompts(6, 21)
    refs = [served.refs[0], served.other_refs[0], None, served.other_refs[1], served.refs[1]]
    all_cases = [(ref, long) for ref in refs[:3]] + [(ref, short) for ref in refs[3:]]
    driver = start(served, enable_fused=enable_fused)
    answers = run(driver, all_cases)

    assert_exact(served, all_cases, answers)
    assert driver.engine.stats().resident_bases == 2
    assert max(output.num_distinct for output in answers[0].outputs) == 5
