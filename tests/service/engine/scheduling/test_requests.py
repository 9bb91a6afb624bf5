"""The parameters of a request and the ways in which it can end, seen from outside the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.errors import EngineOverloaded, InvalidInput
from tests.service.engine.driver import GREEDY, Driver
from tests.service.engine.models import VOCAB_SIZE, Served
from tests.waiting import wait_until_sync

Start = Callable[..., Driver]


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([1], {"logit_bias": {1: float("nan")}}, "logit_bias"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 1.5}, "top_p"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"min_p": float("inf")}, "min_p"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([1], {"max_tokens": -1}, "max_tokens"),
        ([1], {"max_tokens": 256}, "max_tokens"),
        ([1] * 256, {"max_tokens": 1}, "prompt"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(
    llama: Served, start: Start, prompt: list[int], params: dict[str, Any], param: str
) -> None:
    driver = start(llama)
    with pytest.raises(InvalidInput) as caught:
        driver.submit(prompt, SamplingParams(**params))
    assert caught.value.param == param
    assert not driver.engine.has_work


def test_a_request_that_never_fits_the_pool_is_refused_with_numbers(llama: Served, start: Start) -> None:
    driver = start(llama, num_blocks=4, block_size=8)
    with pytest.raises(
        InvalidInput, match=r"30 tokens and max_tokens is 3, together 33; .* up to 32"
    ) as caught:
        driver.submit([1] * 30, SamplingParams(max_tokens=3, temperature=0))
    assert caught.value.code == "context_length_exceeded"
    assert driver.engine.info().max_model_len == 32

    answer = driver.submit([1] * 30, SamplingParams(max_tokens=2, temperature=0))
    scored = driver.submit([1] * 32, SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0))
    driver.run()
    assert len(answer.token_ids) == 2
    reports = scored.outputs[0].prompt_logprobs
    assert reports is not None
    expected = llama.prompt_oracle(None, [1] * 32)
    assert [r.logprob for r in reports] == pytest.approx([float(row[1]) for row in expected], abs=1e-4)


def test_a_request_id_is_in_flight_once(llama: Served, start: Start) -> None:
    driver = start(llama)
    answer = driver.submit([1, 2])
    with pytest.raises(InvalidInput, match="in flight already"):
        driver.engine.submit(GenerationRequest(driver.id_of(answer), "default", [1], GREEDY))
    driver.run()
    assert answer.finish_reason == "length"
    driver.engine.submit(GenerationRequest(driver.id_of(answer), "default", [1], GREEDY))


def test_the_waiting_queue_has_a_limit(llama: Served, start: Start) -> None:
    driver = start(llama, max_waiting=2)
    driver.submit([1])
    driver.submit([2], adapter=llama.refs[0])
    with pytest.raises(EngineOverloaded):
        driver.submit([3])
    driver.run()
    driver.submit([3])


def test_a_stop_token_is_the_last_one_and_reported_as_the_others_are(llama: Served, start: Start) -> None:
    prompt = llama.prompts(9)[0]
    expected, _ = llama.oracle(None, prompt, 12)
    stop = expected[5]
    end = expected.index(stop)
    driver = start(llama)
    stopped = driver.submit(prompt, replace(GREEDY, stop_token_ids=(stop, VOCAB_SIZE + 5)))
    others = driver.submit(prompt, replace(GREEDY, stop_token_ids=(VOCAB_SIZE + 5,)))
    driver.run()

    assert stopped.token_ids == expected[: end + 1]
    assert [report.token_id for report in stopped.logprobs] == stopped.token_ids
    assert stopped.finish_reason == "stop"
    assert (others.token_ids, others.finish_reason) == (expected, "length")


def test_min_tokens_keeps_stop_tokens_away(llama: Served, start: Start) -> None:
    prompt = llama.prompts(9)[0]
    stop = llama.oracle(None, prompt, 1)[0][0]
    driver = start(llama)
    answer = driver.submit(prompt, replace(GREEDY, stop_token_ids=(stop,), min_tokens=4))
    at_once = driver.submit(prompt, replace(GREEDY, stop_token_ids=(stop,)))
    driver.run()

    assert stop not in answer.token_ids[:4]
    assert len(answer.token_ids) > 4
    assert (at_once.token_ids, at_once.finish_reason) == ([stop], "stop")


def test_penalties_and_bias_change_the_choice_but_not_the_reported_logprobs(
    llama: Served, start: Start
) -> None:
    prompt = llama.prompts(9)[0]
    first = llama.oracle(None, prompt, 1)[0][0]
    driver = start(llama)
    answer = driver.submit(prompt, replace(GREEDY, logit_bias={first: -50.0}, logprobs=2))
    unique = driver.submit(prompt, replace(GREEDY, presence_penalty=100.0))
    driver.run()

    assert first not in answer.token_ids
    assert answer.logprobs[0].top[0][0] == first
    assert answer.logprobs[0].top[1] == (answer.token_ids[0], answer.logprobs[0].logprob)
    assert len(set(unique.token_ids)) == 12


@pytest.mark.parametrize("max_batch_tokens", [7, 512])
def test_prompt_logprobs(served: Served, start: Start, max_batch_tokens: int) -> None:
    ref, prompt = served.refs[0], served.prompts(29)[0]
    driver = start(served, max_batch_tokens=max_batch_tokens)
    driver.submit(prompt, adapter=ref)
    driver.run()  # fills the prefix cache, which must not be used here
    answer = driver.submit(prompt, replace(GREEDY, prompt_logprobs=3), ref)
    scored = driver.submit(prompt, replace(GREEDY, prompt_logprobs=0, max_tokens=0), ref)
    driver.run()

    expected = served.prompt_oracle(ref, prompt)
    reports = answer.outputs[0].prompt_logprobs
    assert reports is not None
    assert [report.token_id for report in reports] == prompt[1:]
    for row, report in zip(expected, reports, strict=True):
        assert report.logprob == pytest.approx(float(row[report.token_id]), abs=1e-4)
        assert [token for token, _ in report.top] == row.topk(3).indices.tolist()
    assert all(output.prompt_logprobs is None for output in answer.outputs[1:])
    assert answer.last.num_cached_tokens == 0
    assert len(scored.outputs) == 1
    assert (scored.token_ids, scored.finish_reason) == ([], "length")
    assert scored.outputs[0].prompt_logprobs is not None
    assert [r.logprob for r in scored.outputs[0].prompt_logprobs] == pytest.approx(
        [r.logprob for r in reports]
    )


def test_prompt_logprobs_survive_a_preemption(llama: Served, start: Start) -> None:
    prompts = llama.prompts(20, 38)
    driver = start(llama, num_blocks=9, max_batch_tokens=3)
    driver.submit(prompts[0], replace(GREEDY, max_tokens=25))
    scored = driver.submit(prompts[1], replace(GREEDY, prompt_logprobs=0))
    while driver.engine.stats().preemptions_total == 0:
        driver.step()
    assert not scored.outputs, "preempted in the middle of its prompt"
    driver.run()

    reports = [report for output in scored.outputs for report in output.prompt_logprobs or []]
    expected = llama.prompt_oracle(None, prompts[1])
    assert [r.token_id for r in reports] == prompts[1][1:]
    assert [r.logprob for r in reports] == pytest.approx(
        [float(row[t]) for row, t in zip(expected, prompts[1][1:], strict=True)], abs=1e-4
    )
    assert scored.token_ids == llama.oracle(None, prompts[1], 12)[0]


def test_a_prompt_of_one_token(llama: Served, start: Start) -> None:
    driver = start(llama)
    answer = driver.submit([5], replace(GREEDY, prompt_logprobs=2))
    driver.run()
    assert answer.outputs[0].prompt_logprobs == []
    assert answer.token_ids == llama.oracle(None, [5], 12)[0]


def test_cancel_ends_a_request_wherever_it_is(llama: Served, start: Start) -> None:
    driver = start(llama, max_batch_seqs=1)
    running, waiting = driver.submit([1, 2, 3]), driver.submit([4, 5])
    parked = driver.submit([6], adapter=llama.refs[0])
    driver.step()
    for answer in (running, waiting, parked):
        driver.engine.cancel(driver.id_of(answer))
    driver.engine.cancel("never seen")
    assert driver.engine.has_work
    driver.run()

    assert [answer.finish_reason for answer in (running, waiting, parked)] == ["cancelled"] * 3
    assert len(running.token_ids) == 1
    assert driver.engine.stats().kv_blocks_used == 0
    driver.engine.cancel(driver.id_of(running))
    assert not driver.engine.has_work


def test_a_deadline_ends_a_request_that_waits_for_an_adapter(llama: Served, start: Start) -> None:
    driver = start(llama)
    late = driver.submit([1, 2], adapter=llama.refs[0], timeout_s=0.01)
    in_time = driver.submit([1, 2], timeout_s=100.0)
    driver.engine.missing_adapters()  # requested, but never provided
    wait_until_sync(lambda: driver.engine.has_work and driver.step() and late.outputs)
    driver.run()

    assert (late.finish_reason, late.error_code) == ("error", "deadline_exceeded")
    assert in_time.finish_reason == "length"


def test_figures_add_up(llama: Served, start: Start) -> None:
    prompt = llama.prompts(20)[0]
    driver = start(llama)
    for _ in range(2):
        driver.submit(prompt, adapter=llama.refs[0])
        driver.run()
    stats, info = driver.engine.stats(), driver.engine.info()

    assert (stats.prompt_tokens_total, stats.cached_prompt_tokens_total) == (40, 16)
    assert stats.generation_tokens_total == 24
    assert stats.adapter_loads_total == {"cached": 1, "resident": 1}
    assert (stats.slots, stats.slots_resident, stats.slots_pinned, stats.resident_bases) == (8, 1, 0, 1)
    assert stats.kv_blocks_used == 0
    assert (
        stats.kv_blocks_cached == stats.kv_blocks - driver.engine.pool.num_available + stats.kv_blocks_cached
    )
    weights = sum(p.nbytes for p in llama.pristine.parameters())
    assert weights <= stats.memory_bytes["weights"] <= weights + 4096  # and the rotary buffers
    assert stats.memory_bytes["adapters"] > 9 * llama.adapters[llama.refs[0]].R.nbytes
    assert stats.memory_bytes["bases"] == llama.basis.manifest.factor_bytes
    assert stats.memory_bytes["process_rss"] > stats.memory_bytes["weights"]
    assert (info.vocab_size, info.max_model_len, info.device, info.dtype) == (
        VOCAB_SIZE,
        256,
        "cpu",
        "float32",
    )
    assert (info.model_id, info.default_basis_id) == (llama.base.model_id, llama.basis.basis_id)
