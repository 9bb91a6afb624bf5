"""Steps over static tensors, and steps started before the tokens of the last one are known, must differ from
plain steps in speed only. On the CPU the tensors are the same and nothing is captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.engine.engine import Engine
from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.settings import EngineConfig
from service.engine.steps.shapes import MAX_ROWS
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tests.service.engine.driver import GREEDY, Answer, Driver
from tests.service.engine.models import Served, family
from tests.service.engine.test_exactness import assert_exact, cases, run

Start = Callable[..., Driver]
WAYS: dict[str, dict[str, Any]] = {
    "static": {"decode_graphs": "static"},
    "ahead": {"lookahead": "on"},
    "static ahead": {"decode_graphs": "static", "lookahead": "on"},
}
CROWDED = {"num_blocks": 10, "max_batch_tokens": 16}


def has_mixed_shapes(driver: Driver) -> bool:
    """Whether steps with pieces of prompts ran over static tensors."""
    steps = driver.engine.runner.static_steps
    return steps is not None and any(shape.is_mixed for shape in steps.shapes)


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
    assert_exact(served, all_cases, run(driver, all_cases))  # from the prefix cache, if there is one
    assert has_mixed_shapes(driver) == ("decode_graphs" in way)
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
    """With seeds, penalties, stop tokens and minimum lengths the outputs are those of plain steps, token by
    token."""
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
    following = driver.submit(prompt, adapter=llama.refs[0])  # in the blocks that were released
    driver.run()

    assert stopping.token_ids == tokens[: tokens.index(stop) + 1]
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


@pytest.mark.parametrize(
    ("chunks", "params", "basis_id", "expected"),
    [
        ([(7, 1), (0, 40)], {}, "own", True),
        ([(7, 1)], {}, None, True),
        ([(0, 30)], {"prompt_logprobs": 0}, "own", False),
        ([(3, 1), (0, 9)], {}, "other", False),
        ([(3, 1)], {}, "other", False),
        ([(0, MAX_ROWS)], {}, "own", True),
        ([(8, 1), (3, 1), (0, MAX_ROWS - 1)], {}, "own", False),
    ],
)
def test_what_is_static(
    llama: Served,
    start: Start,
    chunks: list[tuple[int, int]],
    params: dict[str, Any],
    basis_id: str | None,
    expected: bool,
) -> None:
    """A scored prompt, an adapter of another basis, or more tokens than the largest shape exclude static
    tensors."""
    steps = start(llama, decode_graphs="static", max_batch_tokens=2 * MAX_ROWS).engine.runner.static_steps
    assert steps is not None
    ref = None if basis_id is None else AdapterRef("default", "a", 1, basis_id)
    plan = StepPlan()
    for order, (first, length) in enumerate(chunks):
        request = GenerationRequest(str(order), "t", [1] * (first + length), SamplingParams(**params), ref)
        plan.chunks.append(Chunk(EngineRequest(request, order, b""), first, length))

    assert steps.can_run(plan, "own") == expected


@dataclass(frozen=True)
class Request:
    """which: the number of an adapter, 0 for the base model; the last ones belong to another basis.
    arrives_at: a step."""

    which: int
    length: int
    max_tokens: int
    arrives_at: int
    extras: dict[str, Any]


REQUESTS = st.lists(
    st.builds(
        Request,
        which=st.integers(0, 6),
        length=st.integers(1, 30),
        max_tokens=st.integers(0, 8),
        arrives_at=st.integers(0, 8),
        extras=st.sampled_from(
            [{}, {}, {"prompt_logprobs": 1}, {"temperature": 1.0, "seed": 1}, {"presence_penalty": 0.7}]
        ),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=50)
@given(
    requests=REQUESTS,
    num_blocks=st.integers(10, 30),
    max_batch_tokens=st.sampled_from([4, 16, 17, 50]),
    enable_prefix_cache=st.booleans(),
    lookahead=st.sampled_from(["on", "off"]),
)
def test_any_traffic_says_what_plain_steps_say(requests: list[Request], **config: Any) -> None:
    """With chunks of all sizes, adapters, preemption, and tokens that the host does not know yet."""
    served = family("micro")
    plain = answers_to(served, requests, {**config, "lookahead": "off"})
    static = answers_to(served, requests, {**config, "decode_graphs": "static"})

    for got, expected in zip(static, plain, strict=True):
        assert got.token_ids == expected.token_ids
        assert got.finish_reason == expected.finish_reason
        for one, other in zip(got.logprobs, expected.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def answers_to(served: Served, requests: list[Request], config: dict[str, Any]) -> list[Answer]:
    fixed: dict[str, Any] = {"block_size": 4, "num_slots": 3, "max_batch_seqs": 5}
    engine = Engine(served.base, EngineConfig(**fixed, **config))
    try:
        engine.add_basis(served.basis)
        driver = Driver(engine, served.adapters, {served.other_basis.basis_id: served.other_basis})
        refs = [None, *served.refs, *served.other_refs]
        answers: dict[int, Answer] = {}
        for step in range(9):
            for number, request in enumerate(requests):
                if request.arrives_at == step:
                    params = replace(GREEDY, max_tokens=request.max_tokens, **request.extras)
                    prompt = served.prompts(request.length, seed=number)[0]
                    answers[number] = driver.submit(prompt, params, refs[request.which])
            driver.fetch()
            driver.step()
        driver.run()
        return [answers[number] for number in range(len(requests))]
    finally:
        engine.close()


def test_warming_up_leaves_nothing_behind(llama: Served, start: Start) -> None:
    """Every shape runs on padding: no KV is written, and the steps that follow are exact."""
    driver = start(llama, decode_graphs="static", max_batch_tokens=40, max_batch_seqs=5)
    steps, engine = driver.engine.runner.static_steps, driver.engine
    assert steps is not None
    with torch.inference_mode():
        steps.warm_up(engine.bases.tables[llama.basis.basis_id])
    shapes = steps.shapes

    assert {shape.num_rows for shape in shapes if shape.is_mixed} == {16, 32, 40}
    assert {shape.num_rows for shape in shapes if not shape.is_mixed} == {1, 2, 3, 4, 5}
    assert not any(page.any() for layer in range(3) for page in engine.kv.pages_of(layer))
    all_cases = cases(llama)
    assert_exact(llama, all_cases, run(driver, all_cases))
    assert steps.shapes == shapes


@pytest.mark.parametrize("field", ["decode_graphs", "lookahead", "attention"])
def test_unknown_words_are_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=f"{field}\n  Input should be .* or "):
        EngineConfig(**{field: "maybe"})
