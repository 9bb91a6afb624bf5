"""The output of one user does not depend on others: random neighbours, poisoned adapters, reused slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from service.engine.wire.messages import SamplingParams
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tests.service.engine.driver import Answer, Driver
from tests.service.engine.models import Served, family, more_adapters

#: In float32 on a CPU sums have another order, because rows of other lengths make another matrix. The largest
#: difference of a log-probability over 60 random batches was 2.4e-6.
TOLERANCE = 1e-4
NUM_SLOTS = 3
POISON = "poison"


@dataclass(frozen=True)
class Neighbour:
    """which: the number of an adapter, 0 for the base model, -1 for the poisoned one. arrives_at: a step."""

    which: int
    length: int
    max_tokens: int
    temperature: float
    arrives_at: int
    cancelled_at: int | None


NEIGHBOURS = st.lists(
    st.builds(
        Neighbour,
        which=st.integers(-1, 6),
        length=st.integers(1, 40),
        max_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 1.0]),
        arrives_at=st.integers(0, 6),
        cancelled_at=st.none() | st.integers(7, 12),
    ),
    max_size=7,
)


class Company:
    """One engine for all examples, so that slots and blocks are full of what others left."""

    def __init__(self, served: Served, **options: str) -> None:
        self.served = served
        adapters = more_adapters(served, 6)
        self.refs: list[AdapterRef | None] = [None, *adapters]
        config = EngineConfig(
            num_blocks=40, block_size=8, num_slots=NUM_SLOTS, max_batch_tokens=48, max_batch_seqs=6, **options
        )
        self.engine = Engine(served.base, config)
        self.engine.add_basis(served.basis)
        self.driver = Driver(self.engine, adapters)
        shape = (served.basis.num_modules, served.basis.rank, served.basis.rank)
        poison = Adapter(served.basis.basis_id, torch.full(shape, 3e38))  # finite, until it is multiplied
        self.poisoned = AdapterRef("default", POISON, 1, served.basis.basis_id)
        self.driver.adapters[self.poisoned] = poison
        self._alone: dict[tuple[AdapterRef | None, int, int], Answer] = {}

    def prompt(self, length: int, seed: int) -> list[int]:
        return self.served.prompts(length, seed=seed)[0]

    def alone(self, which: int, length: int, max_tokens: int) -> Answer:
        """The same request without any other."""
        key = (self.refs[which], length, max_tokens)
        if key not in self._alone:
            self.driver.run()
            self._alone[key] = self.ask(which, length, max_tokens)
            self.driver.run()
        return self._alone[key]

    def ask(self, which: int, length: int, max_tokens: int) -> Answer:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=3)
        return self.driver.submit(self.prompt(length, seed=0), params, self.refs[which])

    def join(self, number: int, neighbour: Neighbour) -> Answer:
        params = SamplingParams(
            max_tokens=neighbour.max_tokens, temperature=neighbour.temperature, seed=number
        )
        ref = self.poisoned if neighbour.which < 0 else self.refs[neighbour.which % len(self.refs)]
        prompt = self.prompt(neighbour.length, seed=number + 1)
        return self.driver.submit(prompt, params, ref, tenant=f"t{number % 2}")

    def run_beside(self, which: int, length: int, max_tokens: int, neighbours: list[Neighbour]) -> Answer:
        """The request while others come, go and fail."""
        answer = self.ask(which, length, max_tokens)
        joined: dict[int, Answer] = {}
        for step in range(13):
            for number, neighbour in enumerate(neighbours):
                if neighbour.arrives_at == step:
                    joined[number] = self.join(number, neighbour)
                elif neighbour.cancelled_at == step and number in joined:
                    self.engine.cancel(self.driver.id_of(joined[number]))
            self.driver.fetch()
            self.driver.step()
        self.driver.run()
        for number, other in joined.items():
            is_poisoned = neighbours[number].which < 0
            assert (other.error_code == "non_finite_logits") <= is_poisoned
            assert other.error_code in (None, "non_finite_logits")
        return answer


@pytest.fixture(scope="module", params=[("llama", "off", "off"), ("gemma2", "on", "static")], ids=str)
def company(request: pytest.FixtureRequest) -> Iterator[Company]:
    name, lookahead, decode_graphs = request.param
    company = Company(family(name), lookahead=lookahead, decode_graphs=decode_graphs)
    yield company
    company.engine.close()


def assert_same(answer: Answer, expected: Answer) -> None:
    assert answer.token_ids == expected.token_ids
    for got, other in zip(answer.logprobs, expected.logprobs, strict=True):
        assert got.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
        assert dict(got.top) == pytest.approx(dict(other.top), abs=TOLERANCE)


@settings(max_examples=25)
@given(which=st.integers(0, 6), length=st.integers(1, 40), neighbours=NEIGHBOURS)
def test_an_answer_does_not_depend_on_the_neighbours(
    company: Company, which: int, length: int, neighbours: list[Neighbour]
) -> None:
    expected = company.alone(which, length, 8)

    answer = company.run_beside(which, length, 8, neighbours)

    assert answer.error_code is None
    assert_same(answer, expected)


@settings(max_examples=15)
@given(order=st.lists(st.integers(-1, 6), min_size=4, max_size=8))
def test_a_slot_that_was_used_before_leaves_no_trace(company: Company, order: list[int]) -> None:
    """One adapter after another, with a poisoned one among them, through fewer slots than adapters."""
    for number, which in enumerate(order):
        if which < 0:
            answer = company.join(number, Neighbour(-1, 9, 4, 0.0, 0, None))
            company.driver.run()
            assert answer.error_code == "non_finite_logits"
        else:
            expected = company.alone(which, 9, 4)
            answer = company.ask(which, 9, 4)
            company.driver.run()
            assert_same(answer, expected)


def test_an_unloaded_adapter_leaves_zeros_behind(company: Company) -> None:
    company.join(0, Neighbour(-1, 9, 4, 0.0, 0, None))
    company.driver.run()
    for ref in (company.poisoned, *company.refs):
        if ref is not None:
            company.engine.unload(ref.tenant, ref.adapter_id)

    [table] = company.engine.bases.tables.values()
    company.engine.check_integrity()
    assert not table.R_slots.any()
