"""Adapters that are fetched: only once, missing, corrupt, too many, unloaded, poisoned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from service.engine.adapters.resident_bases import MAX_BLOCKED_PASSES
from tessera.errors import CorruptRecord, StoreUnavailable
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tests.service.engine.driver import GREEDY, Answer, Driver
from tests.service.engine.models import Served, more_adapters

Start = Callable[..., Driver]


def test_an_adapter_is_asked_for_once_and_then_cached(llama: Served, start: Start) -> None:
    driver = start(llama)
    prompt = llama.prompts(5)[0]
    for _ in range(3):
        driver.submit(prompt, adapter=llama.refs[0])
    driver.run()
    driver.submit(prompt, adapter=llama.refs[0])
    driver.run()
    assert driver.num_fetched == 1


def test_an_adapter_on_its_way_holds_nobody_up(llama: Served, start: Start) -> None:
    driver = start(llama)
    prompt = llama.prompts(5)[0]
    late = driver.submit(prompt, adapter=llama.refs[0])
    [ref] = driver.engine.missing_adapters()
    others = [driver.submit(prompt), driver.submit(prompt, adapter=llama.refs[1])]
    driver.fetch()
    while driver.engine.has_work:
        driver.step()
    assert [answer.finish_reason for answer in others] == ["length"] * 2
    assert not late.outputs
    assert driver.engine.stats().num_waiting_for_adapter == 1

    driver.engine.provide_adapter(ref, llama.adapters[ref])
    driver.run()
    assert late.token_ids == llama.oracle(ref, prompt, 12)[0]


@pytest.mark.parametrize(
    "error",
    [CorruptRecord("fails its checksum"), StoreUnavailable("no answer")],
    ids=lambda error: error.code,
)
def test_an_adapter_that_cannot_be_had_fails_only_its_requests(
    llama: Served, start: Start, error: CorruptRecord | StoreUnavailable
) -> None:
    driver = start(llama)
    bad, good = llama.refs[:2]
    driver.adapters[bad] = error
    unknown = AdapterRef("default", "unknown", 1, llama.basis.basis_id)
    answers = [driver.submit([1, 2, 3], adapter=ref) for ref in (bad, bad, good, None, unknown)]
    driver.run()

    codes = [answer.error_code for answer in answers]
    assert codes == [error.code, error.code, None, None, "model_not_found"]
    assert answers[0].last.error == (error.code, error.message)
    assert driver.engine.stats().adapter_load_failures_total == 2

    driver.adapters[bad] = llama.adapters[bad]  # the failure is not remembered
    again = driver.submit([1, 2, 3], adapter=bad)
    driver.run()
    assert again.finish_reason == "length"


def test_an_adapter_that_does_not_fit_its_basis_fails_only_its_requests(llama: Served, start: Start) -> None:
    driver = start(llama)
    wrong_rank, wrong_modules, wrong_basis, wrong_before_basis = (
        AdapterRef("default", f"wrong{index}", 1, basis_id)
        for index, basis_id in enumerate([llama.basis.basis_id] * 3 + [llama.other_basis.basis_id])
    )
    M, r = llama.basis.num_modules, llama.basis.rank
    driver.adapters |= {
        wrong_rank: Adapter(llama.basis.basis_id, torch.ones(M, r + 1, r + 1)),
        wrong_modules: Adapter(llama.basis.basis_id, torch.ones(M - 1, r, r)),
        wrong_basis: Adapter("f" * 64, torch.ones(M, r, r)),
        wrong_before_basis: Adapter(llama.other_basis.basis_id, torch.ones(M, r, r)),
    }
    refs = (wrong_rank, wrong_modules, wrong_basis, wrong_before_basis, llama.refs[0], llama.other_refs[0])
    answers = [driver.submit([1, 2], adapter=ref) for ref in refs]
    driver.run()
    assert [answer.error_code for answer in answers] == ["basis_mismatch"] * 4 + [None] * 2


def test_with_all_slots_pinned_a_request_waits(llama: Served, start: Start) -> None:
    driver = start(llama, num_slots=2, host_cache_bytes=0)
    driver.adapters |= (adapters := more_adapters(llama, 7))
    prompt = llama.prompts(6)[0]
    answers = [driver.submit(prompt, adapter=ref) for ref in adapters]
    base = driver.submit(prompt)
    driver.run()

    assert all(answer.finish_reason == "length" for answer in answers)
    assert len({tuple(answer.token_ids) for answer in answers}) == 7
    assert base.token_ids == llama.oracle(None, prompt, 12)[0]
    assert max(output.num_distinct for output in base.outputs) == 3
    stats = driver.engine.stats()
    assert (stats.slots_resident, stats.slots_pinned, stats.host_cache_entries) == (2, 0, 0)
    assert stats.adapter_evictions_total == {"cached": 7, "resident": 5}


def test_popular_adapters_do_not_keep_another_out_for_ever(llama: Served, start: Start) -> None:
    driver = start(llama, num_slots=1, max_batch_seqs=2)
    popular, rare = llama.refs[:2]
    driver.submit([1], adapter=popular)
    driver.fetch()
    driver.step()
    waiter = driver.submit([1], adapter=rare, tenant="other")
    for _ in range(MAX_BLOCKED_PASSES + 60):
        if len(driver.engine.scheduler.waiting) < 4:
            driver.submit([1], adapter=popular)
        driver.fetch()
        driver.step()
    assert waiter.outputs
    driver.run()


def test_unload_waits_only_for_requests_in_flight(llama: Served, start: Start) -> None:
    driver = start(llama)
    ref, other = llama.refs[:2]
    prompt = llama.prompts(5)[0]
    running = driver.submit(prompt, adapter=ref)
    driver.submit(prompt, adapter=other)
    driver.fetch()
    driver.step()
    slot = driver.engine.bases.tables[ref.basis_id].pin(ref, None)
    assert slot is not None
    driver.engine.bases.tables[ref.basis_id].unpin(slot)

    driver.engine.unload(ref.tenant, ref.adapter_id)
    stats = driver.engine.stats()
    assert (stats.host_cache_entries, stats.slots_resident) == (1, 2)
    driver.run()

    assert running.token_ids == llama.oracle(ref, prompt, 12)[0]
    assert driver.engine.stats().slots_resident == 1
    assert not driver.engine.bases.tables[ref.basis_id].R_slots[slot].any()
    driver.engine.unload(other.tenant, other.adapter_id)
    assert (driver.engine.stats().host_cache_entries, driver.engine.stats().slots_resident) == (0, 0)


def test_unload_while_the_adapter_is_on_its_way(llama: Served, start: Start) -> None:
    driver = start(llama)
    ref = llama.refs[0]
    answer = driver.submit([1, 2], adapter=ref)
    assert driver.engine.missing_adapters() == [ref]
    driver.engine.unload(ref.tenant, ref.adapter_id)
    driver.engine.cancel(driver.id_of(answer))
    driver.engine.provide_adapter(ref, llama.adapters[ref])
    driver.run()
    assert driver.engine.stats().host_cache_entries == 0

    again = driver.submit([1, 2], adapter=ref)
    assert driver.engine.missing_adapters() == [ref]
    driver.engine.unload(ref.tenant, ref.adapter_id)
    driver.engine.provide_adapter(ref, llama.adapters[ref])
    driver.run()
    assert again.finish_reason == "length"
    assert (driver.engine.stats().host_cache_entries, driver.engine.stats().slots_resident) == (0, 0)


def test_requests_in_line_fetch_again_what_was_unloaded(llama: Served, start: Start) -> None:
    driver = start(llama, max_batch_seqs=1)
    ref = llama.refs[0]
    first = driver.submit([1, 2])
    second = driver.submit([1, 2], adapter=ref)
    driver.fetch()
    driver.step()
    driver.engine.unload(ref.tenant, ref.adapter_id)
    del driver.adapters[ref]
    driver.run()
    assert (first.finish_reason, second.error_code) == ("length", "model_not_found")


def test_two_versions_run_side_by_side(llama: Served, start: Start) -> None:
    old, other = llama.refs[:2]
    new = replace(old, version=2)
    driver = start(llama)
    driver.adapters[new] = llama.adapters[other]
    prompt = llama.prompts(17)[0]
    answers = [driver.submit(prompt, adapter=ref) for ref in (old, new)]
    driver.run()
    assert answers[0].token_ids == llama.oracle(old, prompt, 12)[0]
    assert answers[1].token_ids == llama.oracle(other, prompt, 12)[0]


def test_tenants_never_share_a_block(llama: Served, start: Start) -> None:
    driver = start(llama)
    prompt = llama.prompts(33)[0]
    answers: list[Answer] = []
    for tenant in ("one", "two", "one"):
        answers.append(driver.submit(prompt, tenant=tenant))
        driver.run()
    assert [answer.last.num_cached_tokens for answer in answers] == [0, 0, 32]


@pytest.mark.parametrize("served", ["llama", "gemma2"], indirect=True)
@pytest.mark.parametrize("where", ["all modules", "v_proj only"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
def test_extreme_values_of_one_user_stay_with_that_user(
    served: Served, start: Start, value: float, where: str
) -> None:
    bad, good = served.refs[:2]
    driver = start(served, num_blocks=24, max_batch_tokens=16)
    long, short = served.prompts(30, 9)
    warm = driver.submit(short, replace(GREEDY, max_tokens=1), bad)
    driver.run()
    table = driver.engine.bases.tables[bad.basis_id]
    slot = table.pin(bad, None)
    assert slot is not None
    table.unpin(slot)
    is_poisoned = [where == "all modules" or "v_proj" in m.name for m in served.basis.manifest.modules]
    table.R_slots[slot, is_poisoned] = value

    poisoned = [driver.submit(long, adapter=bad), driver.submit(short[:4], adapter=bad)]
    others = [driver.submit(long, adapter=good), driver.submit(short), driver.submit(long)]
    driver.run()
    after = driver.submit(served.prompts(50)[0])  # in blocks that belonged to the poisoned one
    driver.run()

    assert warm.finish_reason == "length"
    if value != 1e30:
        assert [answer.error_code for answer in poisoned] == ["non_finite_logits"] * 2
    for answer, (ref, prompt) in zip(others, [(good, long), (None, short), (None, long)], strict=True):
        tokens, logprobs = served.oracle(ref, prompt, 12)
        assert answer.token_ids == tokens
        assert [report.logprob for report in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)
    assert after.token_ids == served.oracle(None, served.prompts(50)[0], 12)[0]
