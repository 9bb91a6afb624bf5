"""Several bases on one device: fetched, refused, and alternating if there is no place for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from service.engine.adapters.resident_bases import MAX_BLOCKED_PASSES
from tessera.errors import BasisMismatch, InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import make_basis
from tests.service.engine.driver import GREEDY, Driver
from tests.service.engine.models import Served, more_adapters, more_bases

Start = Callable[..., Driver]


def test_a_basis_that_cannot_be_had_fails_only_its_requests(llama: Served, start: Start) -> None:
    driver = start(llama)
    foreign = make_basis(
        model_id="another model",
        method="test",
        factors={m: (torch.randn(2, m.d_in), torch.randn(m.d_out, 2)) for m in llama.basis.manifest.modules},
        recipe={},
    )
    driver.bases[foreign.basis_id] = foreign
    driver.bases["e" * 64] = llama.other_basis
    adapters = more_adapters(llama, 1, foreign) | {
        AdapterRef("default", "lost", 1, basis_id): Adapter(basis_id, torch.ones(1, 2, 2))
        for basis_id in ("d" * 64, "e" * 64)
    }
    driver.adapters |= adapters
    answers = [driver.submit([1, 2], adapter=ref) for ref in (*adapters, llama.refs[0])]
    driver.run()
    assert [a.error_code for a in answers] == ["basis_mismatch", "basis_not_found", "basis_mismatch", None]
    with pytest.raises(BasisMismatch):
        driver.engine.add_basis(foreign)


def test_bases_take_turns_where_there_is_no_place_for_all(llama: Served, start: Start) -> None:
    driver = start(llama, max_resident_bases=2)
    adapters = {}
    for index, basis in enumerate(more_bases(llama, 3)):
        driver.bases[basis.basis_id] = basis
        for ref, adapter in more_adapters(llama, 2, basis).items():
            adapters[replace(ref, adapter_id=f"{ref.adapter_id}-{index}")] = adapter
    driver.adapters |= adapters
    answers = {ref: driver.submit([1, 2, 3], adapter=ref) for ref in [*adapters, llama.refs[0]]}
    driver.run()

    assert {answer.finish_reason for answer in answers.values()} == {"length"}
    assert driver.engine.stats().resident_bases == 2
    assert llama.basis.basis_id in driver.engine.bases, "a basis that was added stays"
    assert answers[llama.refs[0]].token_ids == llama.oracle(llama.refs[0], [1, 2, 3], 12)[0]


def test_a_busy_basis_is_closed_for_one_that_waits(llama: Served, start: Start) -> None:
    busy, waiting = more_bases(llama, 2)
    driver = start(llama, max_resident_bases=2, max_batch_seqs=2)
    driver.bases |= {basis.basis_id: basis for basis in (busy, waiting)}
    [(busy_ref, _)] = (adapters := more_adapters(llama, 1, busy)).items()
    [(waiting_ref, _)] = (other_adapters := more_adapters(llama, 1, waiting)).items()
    driver.adapters |= adapters | other_adapters
    driver.submit([1], adapter=busy_ref)
    driver.fetch()
    driver.step()
    waiter = driver.submit([1], adapter=waiting_ref)
    num_steps = 0
    while not waiter.outputs:
        if len(driver.engine.scheduler.waiting) < 4:  # there is always more work for the busy basis
            driver.submit([1], adapter=busy_ref)
        driver.fetch()
        driver.step()
        num_steps += 1
        assert num_steps < MAX_BLOCKED_PASSES + 60, "starved"
    driver.run()
    assert waiter.finish_reason == "length"


def test_a_basis_is_used_before_it_makes_place_again(llama: Served, start: Start) -> None:
    driver = start(llama, max_resident_bases=2)
    first, second = more_bases(llama, 2)
    adapters = more_adapters(llama, 1, first) | more_adapters(llama, 1, second)
    answers = [driver.submit([1], adapter=ref) for ref in adapters]
    assert driver.engine.missing_bases() == [first.basis_id]
    for ref in driver.engine.missing_adapters():
        driver.engine.provide_adapter(ref, adapters[ref])
    driver.engine.provide_basis(first.basis_id, first)

    assert driver.engine.missing_bases() == []
    while driver.engine.scheduler.has_work:
        driver.step()
    assert answers[0].finish_reason == "length"
    assert driver.engine.missing_bases() == [second.basis_id]
    driver.engine.provide_basis(second.basis_id, second)
    driver.run()
    assert answers[1].finish_reason == "length"


def test_a_basis_that_left_before_its_adapter_came_is_fetched_again(llama: Served, start: Start) -> None:
    driver = start(llama, max_resident_bases=2)
    early, late = more_bases(llama, 2)
    driver.bases |= {basis.basis_id: basis for basis in (early, late)}
    [(slow_ref, slow)] = more_adapters(llama, 1, early).items()
    driver.adapters |= more_adapters(llama, 1, late)
    waiter = driver.submit([1], adapter=slow_ref)
    assert driver.engine.missing_adapters() == [slow_ref]
    driver.fetch()
    assert early.basis_id in driver.engine.bases
    other = driver.submit([1], adapter=next(iter(more_adapters(llama, 1, late))))
    driver.submit([1], replace(GREEDY, max_tokens=200))
    while early.basis_id in driver.engine.bases:  # until it is closed for the waiting one, because it is idle
        driver.fetch()
        driver.step()
    driver.engine.provide_adapter(slow_ref, slow)
    driver.run()
    assert [answer.finish_reason for answer in (waiter, other)] == ["length"] * 2


def test_no_place_at_all_is_said_at_once(llama: Served, start: Start) -> None:
    driver = start(llama, max_resident_bases=1)
    with pytest.raises(InvalidInput) as caught:
        driver.submit([1], adapter=llama.other_refs[0])
    assert caught.value.code == "basis_not_resident"
    with pytest.raises(InvalidInput, match="no place"):
        driver.engine.add_basis(llama.other_basis)


def test_a_basis_that_is_added_after_a_request_brought_it_stays(llama: Served, start: Start) -> None:
    driver = start(llama, max_resident_bases=2)
    [passing] = more_bases(llama, 1)
    driver.bases[passing.basis_id] = passing
    driver.adapters |= (adapters := more_adapters(llama, 1, passing))
    driver.submit([1], adapter=next(iter(adapters)))
    driver.run()
    driver.engine.add_basis(passing)
    with pytest.raises(InvalidInput, match="not resident"):
        driver.submit([1], adapter=llama.other_refs[0])
    assert driver.engine.info().default_basis_id == llama.basis.basis_id
