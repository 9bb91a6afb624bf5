"""Many users with a basis each, more than fit: all are served exactly, nobody starves, others are not
disturbed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from service.engine.adapters.resident_bases import OWN_BASIS_SLOTS
from tessera.defaults import LLAMA_LINEARS
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.formats.manifest import ModuleShape
from tessera.formats.single_adapter import LowRank, make_single_adapter
from tessera.model.base_model import iter_target_modules
from tests.service.engine.driver import GREEDY, Answer, Driver
from tests.service.engine.models import Served

Start = Callable[..., Driver]
PROMPT = [5, 9, 2, 40]


def plain_lora(served: Served, seed: int) -> tuple[Basis, Adapter]:
    """A LoRA on all linear layers with ranks from 2 to 4, as an import stores it."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for index, (name, linear) in enumerate(iter_target_modules(served.base.model, LLAMA_LINEARS)):
        shape = ModuleShape(name, linear.in_features, linear.out_features)
        rank = 2 + (index + seed) % 3
        A = torch.randn(rank, shape.d_in, generator=generator) / shape.d_in**0.5
        B = torch.randn(shape.d_out, rank, generator=generator)
        changes[shape] = LowRank(A, B, 0.3)
    made = make_single_adapter(
        changes, model_id=served.base.model_id, method="peft", recipe={"is_own": True}, metadata={}
    )
    return made.basis, made.adapter


def users(served: Served, driver: Driver, count: int) -> list[AdapterRef]:
    refs = []
    for seed in range(count):
        basis, adapter = plain_lora(served, seed)
        ref = AdapterRef(f"tenant-{seed}", "mine", 1, basis.basis_id)
        driver.bases[basis.basis_id], driver.adapters[ref] = basis, adapter
        refs.append(ref)
    return refs


def merged_tokens(served: Served, basis: Basis, adapter: Adapter, num_tokens: int) -> list[int]:
    """The greedy tokens of the model with the LoRA merged into dense weights."""
    other = replace(served, basis=basis, adapters={(ref := AdapterRef("", "", 1, basis.basis_id)): adapter})
    other.pristine = served.pristine
    return other.oracle(ref, PROMPT, num_tokens)[0]


def test_more_users_with_own_bases_than_places(llama: Served, start: Start) -> None:
    driver = start(llama, max_resident_bases=3)
    refs = users(llama, driver, 6)
    base = driver.submit(PROMPT, replace(GREEDY, max_tokens=60))
    shared = driver.submit(PROMPT, replace(GREEDY, max_tokens=60), adapter=llama.refs[0])
    answers = [(ref, driver.submit(PROMPT, adapter=ref)) for ref in refs for _ in range(2)]
    numbers = {basis_id: sum(X.numel() for X in (*b.A, *b.B)) for basis_id, b in driver.bases.items()}
    numbers[llama.basis.basis_id] = sum(X.numel() for X in (*llama.basis.A, *llama.basis.B))

    num_steps, most = 0, 0
    while driver.engine.has_work:
        driver.fetch()
        driver.step()
        num_steps += 1
        assert num_steps < 2000
        if num_steps == 60 + 5:  # requests that need no place lose no step
            assert {base.finish_reason, shared.finish_reason} == {"length"}
        resident, stats = driver.engine.bases.tables, driver.engine.stats()
        assert stats.resident_bases <= 3
        assert stats.memory_bytes["bases"] == 4 * sum(numbers[basis_id] for basis_id in resident)
        assert all(resident[basis_id].num_slots <= OWN_BASIS_SLOTS for basis_id in resident)
        most = max(most, stats.resident_bases)

    assert most == 3
    assert {answer.finish_reason for _, answer in answers} == {"length"}
    assert base.token_ids == llama.oracle(None, PROMPT, 60)[0]
    assert shared.token_ids == llama.oracle(llama.refs[0], PROMPT, 60)[0]
    for ref, answer in answers:
        basis, adapter = driver.bases[ref.basis_id], driver.adapters[ref]
        assert isinstance(basis, Basis)
        assert isinstance(adapter, Adapter)
        assert answer.token_ids == merged_tokens(llama, basis, adapter, 12)
        assert answer.token_ids != base.token_ids[:12]


def test_nobody_starves_though_everybody_always_wants_more(llama: Served, start: Start) -> None:
    driver = start(llama, max_resident_bases=3, max_batch_seqs=8)
    refs = users(llama, driver, 5)
    short = replace(GREEDY, max_tokens=2)
    running: dict[AdapterRef, Answer] = {ref: driver.submit(PROMPT, short, adapter=ref) for ref in refs}
    num_answers = dict.fromkeys(refs, 0)
    num_steps = 0
    while min(num_answers.values()) < 2:
        driver.fetch()
        driver.step()
        num_steps += 1
        assert num_steps < 3000, f"starved: {num_answers}"
        for ref, answer in running.items():
            if answer.outputs and answer.finish_reason is not None:
                assert answer.finish_reason == "length"
                num_answers[ref] += 1
                running[ref] = driver.submit(PROMPT, short, adapter=ref)
    driver.run()


def test_an_own_basis_has_few_slots_and_its_versions_share_them(llama: Served, start: Start) -> None:
    """If more versions are in flight than there are slots, they alternate as adapters of a shared basis
    do."""
    driver = start(llama, max_resident_bases=2, num_slots=16)
    [ref] = users(llama, driver, 1)
    adapter = driver.adapters[ref]
    assert isinstance(adapter, Adapter)
    versions = [replace(ref, version=version) for version in range(1, OWN_BASIS_SLOTS + 4)]
    driver.adapters |= dict.fromkeys(versions, adapter)
    answers = [driver.submit(PROMPT, adapter=version) for version in versions]
    driver.run()
    assert driver.engine.bases.tables[ref.basis_id].num_slots == OWN_BASIS_SLOTS
    assert driver.engine.bases.tables[llama.basis.basis_id].num_slots == 16
    assert len({tuple(answer.token_ids) for answer in answers}) == 1


@pytest.mark.parametrize("enable_fused", [True, False])
@pytest.mark.parametrize("served", ["llama", "gemma2"], indirect=True)
def test_a_lora_of_a_rank_beyond_a_modules_smaller_side_is_served_exactly(
    served: Served, start: Start, enable_fused: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    changes, merged = {}, copy.deepcopy(served.pristine)
    for name, linear in iter_target_modules(served.base.model, ("q_proj", "k_proj", "down_proj")):
        shape = ModuleShape(name, linear.in_features, linear.out_features)
        rank = max(shape.d_in, shape.d_out) - 3
        A = torch.randn(rank, shape.d_in, generator=generator) / shape.d_in**0.5
        B = torch.randn(shape.d_out, rank, generator=generator) / rank**0.5
        changes[shape] = LowRank(A, B, 0.5)
        merged.get_submodule(name).weight.data += 0.5 * B @ A
    assert any(change.rank > min(shape.d_in, shape.d_out) for shape, change in changes.items())
    made = make_single_adapter(changes, model_id=served.base.model_id, method="peft", recipe={}, metadata={})
    narrow = min(min(shape.d_in, shape.d_out) for shape in changes)
    assert made.basis.rank > narrow

    driver = start(served, enable_fused=enable_fused)
    ref = AdapterRef("t", "wide", 1, made.basis.basis_id)
    driver.bases[ref.basis_id], driver.adapters[ref] = made.basis, made.adapter
    answers = [driver.submit(PROMPT, adapter=name) for name in (ref, None, served.refs[0])]
    driver.run()
    other = replace(served, adapters={ref: made.adapter}, _merged={ref: merged})
    assert answers[0].token_ids == other.oracle(ref, PROMPT, 12)[0]
    assert answers[1].token_ids == served.oracle(None, PROMPT, 12)[0]
    assert answers[2].token_ids == served.oracle(served.refs[0], PROMPT, 12)[0]
