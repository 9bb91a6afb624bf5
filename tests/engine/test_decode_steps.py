"""Decode steps over static buffers, and steps started before the last one's tokens are known, must be told
apart from plain steps by nothing but their speed. On the CPU the buffers are the same and nothing is
captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapter_core.adapter import Adapter, AdapterRef
from service.engine.config import EngineConfig
from service.engine.decode_steps import bucket_size
from service.engine.messages import GenerationRequest, SamplingParams
from tests.engine.driver import GREEDY, Answer, Driver
from tests.engine.models import Served, family
from tests.engine.test_exactness import assert_exact, cases, run

Start = Callable[..., Driver]
WAYS: dict[str, dict[str, Any]] = {
    "static": {"decode_graphs": "static"},
    "ahead": {"lookahead": "on"},
    "static ahead": {"decode_graphs": "static", "lookahead": "on"},
}
CROWDED = {"num_blocks": 10, "max_batch_tokens": 16}


@pytest.mark.parametrize(
    ("name", "crowd"),
    [
        ("llama", {"max_batch_tokens": 5}),
        ("llama", CROWDED),
        ("gemma2", {"num_blocks": 9, "enable_prefix_cache": False}),
    ],
    ids=["pieces", "crowded", "no prefixes"],
)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_exact(name: str, way: dict[str, Any], crowd: dict[str, Any], start: Start) -> None:
    served = family(name)
    all_cases = cases(served)
    driver = start(served, **way, **crowd)

    assert_exact(served, all_cases, run(driver, all_cases))
    assert_exact(served, all_cases, run(driver, all_cases))  # from the prefix cache, where there is one
    assert driver.engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_with_another_basis_in_the_batch(llama: Served, start: Start, way: dict[str, Any]) -> None:
    long = llama.prompts(21)[0]
    all_cases = [(llama.refs[0], long), (llama.other_refs[0], long), (None, long)]
    driver = start(llama, **way)
    assert_exact(llama, all_cases, run(driver, all_cases))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_generic_path_too(llama: Served, start: Start, way: dict[str, Any]) -> None:
    all_cases = cases(llama)
    driver = start(llama, enable_fused=False, **way)
    assert_exact(llama, all_cases, run(driver, all_cases))


MANY = [
    SamplingParams(max_tokens=14, temperature=0.9, seed=7, logprobs=2),
    SamplingParams(max_tokens=14, temperature=1.3, top_k=20, top_p=0.9, seed=8),
    SamplingParams(max_tokens=14, temperature=0.0, repetition_penalty=1.4, presence_penalty=0.5),
    SamplingParams(max_tokens=9, temperature=0.0, prompt_logprobs=1),
    SamplingParams(max_tokens=14, temperature=0.7, seed=9, min_tokens=6, stop_token_ids=tuple(range(60))),
    SamplingParams(max_tokens=1, temperature=0.0),
    SamplingParams(max_tokens=0, prompt_logprobs=0),
]


@pytest.mark.parametrize("crowd", [{}, CROWDED], ids=["together", "crowded"])
@pytest.mark.parametrize("way", [WAYS["ahead"], WAYS["static ahead"]], ids=["ahead", "static ahead"])
def test_every_parameter_means_the_same(
    llama: Served, start: Start, way: dict[str, Any], crowd: dict[str, Any]
) -> None:
    """Seeds, penalties, stop tokens, minimum lengths: the outputs of plain steps, token by token."""
    prompts = llama.prompts(*range(3, 3 + len(MANY)))
    everything = []
    for config in ({}, way):
        driver = start(llama, **config, **crowd)
        answers = [
            driver.submit(prompt, params, llama.refs[index % 4])
            for index, (prompt, params) in enumerate(zip(prompts, MANY, strict=True))
        ]
        driver.run()
        driver.engine.close()
        everything.append(answers)

    for plain, other in zip(*everything, strict=True):
        assert other.token_ids == plain.token_ids
        assert other.finish_reason == plain.finish_reason
        assert len(other.logprobs) == len(plain.logprobs)
        for got, expected in zip(other.logprobs, plain.logprobs, strict=True):
            assert got.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_a_stop_token_ends_a_request_whose_next_step_is_under_way(llama: Served, start: Start) -> None:
    prompt = llama.prompts(6)[0]
    tokens, _ = llama.oracle(llama.refs[0], prompt, 12)
    stop = tokens[4]
    driver = start(llama, lookahead="on", num_blocks=4)
    stopping = driver.submit(prompt, replace(GREEDY, stop_token_ids=(stop,)), llama.refs[0])
    driver.run()
    following = driver.submit(prompt, adapter=llama.refs[0])  # in the blocks that were given back
    driver.run()

    assert stopping.token_ids == tokens[: tokens.index(stop)]
    assert stopping.finish_reason == "stop"
    assert_exact(llama, [(llama.refs[0], prompt)], [following])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_cancelled_while_a_step_is_under_way(llama: Served, start: Start, way: dict[str, Any]) -> None:
    first, second = llama.prompts(9, 12)
    driver = start(llama, **way)
    going = driver.submit(first, adapter=llama.refs[1])
    leaving = driver.submit(second, adapter=llama.refs[2])
    for _ in range(4):
        driver.fetch()
        driver.step()
    driver.engine.cancel(driver.id_of(leaving))
    late = driver.submit(second, adapter=llama.refs[3])
    driver.run()

    assert leaving.finish_reason == "cancelled"
    assert_exact(llama, [(llama.refs[1], first), (llama.refs[3], second)], [going, late])


def test_the_same_request_id_again_while_its_last_step_is_under_way(llama: Served, start: Start) -> None:
    prompt = llama.prompts(7)[0]
    driver = start(llama, lookahead="on")
    leaving = driver.submit(prompt)
    driver.step()
    driver.step()
    request_id = driver.id_of(leaving)
    driver.engine.cancel(request_id)
    driver.step()
    driver.answers[request_id] = Answer()
    driver.engine.submit(GenerationRequest(request_id, "default", prompt, GREEDY))
    driver.run()

    assert_exact(llama, [(None, prompt)], [driver.answers[request_id]])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_nan_fails_its_user_only(llama: Served, start: Start, way: dict[str, Any]) -> None:
    prompt = llama.prompts(14)[0]
    broken = AdapterRef("default", "broken", 1, llama.basis.basis_id)
    driver = start(llama, **way)
    R = llama.adapters[llama.refs[0]].R
    driver.adapters[broken] = Adapter(broken.basis_id, torch.full_like(R, 1e38))
    bad = driver.submit(prompt, adapter=broken)
    good = driver.submit(prompt, adapter=llama.refs[0])
    driver.run()
    reused = driver.submit(prompt, adapter=llama.refs[1])
    driver.run()

    assert bad.error_code == "non_finite_logits"
    assert_exact(llama, [(llama.refs[0], prompt), (llama.refs[1], prompt)], [good, reused])


def test_buckets() -> None:
    sizes = [bucket_size(count, 300) for count in range(1, 301)]
    assert all(size >= count for count, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert sizes[-1] == 300
    assert len(set(sizes)) == 26
    assert max(size / count for count, size in enumerate(sizes, 1) if count > 8) <= 1.78


@pytest.mark.parametrize("field", ["decode_graphs", "lookahead", "attention"])
def test_unknown_words_are_refused(field: str) -> None:
    with pytest.raises(Exception, match=f"{field} is one of"):
        EngineConfig(**{field: "maybe"})
