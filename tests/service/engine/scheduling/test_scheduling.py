"""The order in which requests run: fairness, chunking, preemption; and random traffic, which must always
end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.engine.engine import Engine
from service.engine.scheduling.request import EngineRequest
from service.engine.scheduling.scheduler import Scheduler
from service.engine.settings import EngineConfig
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.errors import CorruptRecord, EngineOverloaded, InvalidInput
from tessera.formats.adapter_ref import AdapterRef
from tests.service.engine.driver import GREEDY, Answer, Driver
from tests.service.engine.models import Served, family

Start = Callable[..., Driver]


@pytest.fixture
def micro() -> Served:
    return family("micro")


def test_a_crowd_of_one_tenant_delays_another_by_one_turn(micro: Served, start: Start) -> None:
    driver = start(micro, max_batch_seqs=2)
    crowd = [driver.submit([1, 2], tenant="crowd") for _ in range(20)]
    lonely = driver.submit([1, 2], tenant="lonely")
    while not lonely.outputs:
        driver.step()
    assert sum(bool(answer.outputs) for answer in crowd) == 1
    driver.run()


def test_tenants_take_turns(micro: Served, start: Start) -> None:
    driver = start(micro, max_batch_seqs=1)
    answers = [driver.submit([1], replace(GREEDY, max_tokens=1), tenant=tenant) for tenant in "aaaabbc"]
    order = []
    while driver.engine.has_work:
        order += [driver.answers[output.request_id] for output in driver.step()]
    assert [answers.index(answer) for answer in order] == [0, 4, 6, 1, 5, 2, 3]


def test_a_long_prompt_leaves_room_for_short_ones(micro: Served, start: Start) -> None:
    driver = start(micro, max_batch_tokens=16)
    long, short = driver.submit([1] * 200), driver.submit([2] * 8)
    driver.step()
    assert short.outputs
    assert not long.outputs
    driver.run()


def test_decoding_goes_on_beside_a_long_prefill(micro: Served, start: Start) -> None:
    driver = start(micro, max_batch_tokens=16)
    first = driver.submit([1, 2])
    driver.step()
    driver.submit([3] * 100)
    for count in range(2, 8):
        driver.step()
        assert len(first.token_ids) == count
    driver.run()


def test_a_request_without_blocks_is_not_overtaken_for_ever(micro: Served, start: Start) -> None:
    driver = start(micro, num_blocks=8, block_size=8)
    small = replace(GREEDY, max_tokens=8)
    for _ in range(4):
        driver.submit([1] * 8, small)
    driver.step()
    big = driver.submit([1] * 50, tenant="other")
    for _ in range(40):
        if len(driver.engine.scheduler.waiting) < 6:
            driver.submit([1] * 8, small)
        driver.step()
    assert big.outputs
    driver.run()


def test_the_newest_is_preempted_and_comes_back_first(micro: Served, start: Start) -> None:
    driver = start(micro, num_blocks=6, block_size=4, enable_prefix_cache=False)
    old, new = driver.submit([1] * 8), driver.submit([2] * 8)
    while driver.engine.stats().preemptions_total == 0:
        driver.step()
    later = driver.submit([3] * 2)
    [waiting, _] = driver.engine.scheduler.waiting.candidates()
    assert waiting.request_id == driver.id_of(new)
    before = list(new.token_ids)
    driver.run()
    assert new.token_ids[: len(before)] == before
    assert [len(answer.token_ids) for answer in (old, new, later)] == [12] * 3


def test_more_sequences_than_the_batch_holds(micro: Served, start: Start) -> None:
    driver = start(micro, max_batch_tokens=3, max_batch_seqs=16)
    answers = [driver.submit([1, 2, index]) for index in range(9)]
    driver.run()
    for index, answer in enumerate(answers):
        assert answer.token_ids == micro.oracle(None, [1, 2, index], 12)[0]


def test_prompt_logprobs_are_computed_a_bounded_number_of_rows_at_a_time(micro: Served, start: Start) -> None:
    engine = start(micro).engine
    scheduler = Scheduler(EngineConfig(), engine.pool, engine.residency, max_logit_rows=10)
    wide = SamplingParams(prompt_logprobs=0)
    for name, params in {"first": wide, "second": wide, "plain": SamplingParams()}.items():
        scheduler.enqueue(
            EngineRequest(GenerationRequest(name, "t", [1] * 30, params), len(scheduler.waiting), b"")
        )
    plan = scheduler.schedule()
    lengths = {chunk.request.request_id: chunk.length for chunk in plan.chunks}
    assert lengths == {"first": 10, "second": 1, "plain": 30}


class EngineMachine(RuleBasedStateMachine):
    """Random traffic against a starved engine: every request ends exactly once, has the output of its model
    run alone, and leaves nothing behind."""

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()
        self.greedy: list[tuple[AdapterRef | None, list[int], Answer]] = []

    @initialize(
        num_blocks=st.integers(5, 14),
        num_slots=st.integers(1, 3),
        max_batch_tokens=st.sampled_from([1, 3, 8, 64]),
        max_batch_seqs=st.integers(1, 4),
        max_resident_bases=st.integers(1, 2),
        enable_prefix_cache=st.booleans(),
        decode_graphs=st.sampled_from(["off", "static"]),
        lookahead=st.sampled_from(["off", "on"]),
    )
    def start(self, **config: Any) -> None:
        served = family("micro")
        few_bytes = 3 * served.adapters[served.refs[0]].R.nbytes
        self.engine = Engine(
            served.base, EngineConfig(block_size=4, max_waiting=12, host_cache_bytes=few_bytes, **config)
        )
        self.engine.add_basis(served.basis)
        self.driver = Driver(self.engine, served.adapters, {served.other_basis.basis_id: served.other_basis})
        self.refs: list[AdapterRef | None] = [None, *served.refs, *served.other_refs]
        corrupt = replace(served.refs[0], adapter_id="corrupt")
        self.driver.adapters[corrupt] = CorruptRecord("fails its checksum")
        self.refs.append(corrupt)

    @rule(
        which=st.integers(0, 7),
        tenant=st.sampled_from("ab"),
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=24),
        max_tokens=st.integers(0, 9),
        extras=st.sampled_from(
            [{}, {"prompt_logprobs": 1}, {"temperature": 1.0, "seed": 1}, {"stop_token_ids": (3, 9)}]
        ),
    )
    def submit(
        self, which: int, tenant: str, prompt: list[int], max_tokens: int, extras: dict[str, object]
    ) -> None:
        params = replace(SamplingParams(max_tokens=max_tokens, temperature=0.0), **extras)
        ref = self.refs[which % len(self.refs)]
        try:
            answer = self.driver.submit(prompt, params, ref, tenant=tenant)
            if params.temperature == 0:
                self.greedy.append((ref, prompt, answer))
        except (EngineOverloaded, InvalidInput) as error:
            self.refused.add(error.code)

    @rule(index=st.integers(0, 30))
    def cancel(self, index: int) -> None:
        self.engine.cancel(f"r{index}")

    @rule(index=st.integers(1, 6))
    def unload(self, index: int) -> None:
        ref = self.refs[index % len(self.refs)]
        if ref is not None:
            self.engine.unload(ref.tenant, ref.adapter_id)

    @rule()
    def fetch(self) -> None:
        self.driver.fetch()

    @precondition(lambda self: self.engine.has_work)
    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.driver.step()

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            try:
                self.drain()
            finally:
                self.engine.close()

    def drain(self) -> None:
        self.driver.run()
        stats = self.engine.stats()
        left = (stats.num_running, stats.num_waiting, stats.kv_blocks_used, stats.slots_pinned)
        assert left == (0, 0, 0, 0)
        assert stats.step_failures_total == 0
        assert self.refused <= {"engine_overloaded", "context_length_exceeded", "basis_not_resident"}
        for ref, prompt, answer in self.greedy:
            assert answer.finish_reason in ("stop", "length", "cancelled", "error")
            assert answer.error_code in (None, "corrupt_record")
            if answer.token_ids:
                logprobs = family("micro").prompt_oracle(ref, prompt + answer.token_ids)[len(prompt) - 1 :]
                chosen = logprobs.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
                assert (logprobs.amax(-1) - chosen).max() < 1e-4


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=40, stateful_step_count=40)
