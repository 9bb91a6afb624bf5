"""Slot tables, the host cache, and the linear layers that read the slots."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.engine.adapters.linear import AdapterLinear, attach, detach
from service.engine.adapters.packed_adapter import PackedAdapter, SlotFormat
from service.engine.adapters.residency import AdapterCache
from service.engine.adapters.slots import SlotTable
from service.engine.process.adapter_fetcher import parse_adapter
from tessera.errors import AdapterReplaced, BasisMismatch, CorruptRecord, NotFound
from tessera.formats.adapter import Adapter, delta, read_header
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.model.base_model import iter_target_modules
from tests.service.engine.models import Served

M, RANK = 3, 2
NUM_SLOTS = 3


def ref(index: int, version: int = 1) -> AdapterRef:
    return AdapterRef("t", f"a{index}", version, "basis")


def adapter(value: float) -> PackedAdapter:
    return PackedAdapter("0" * 64, torch.full((M, RANK, RANK), float(value)))


def make_table(num_slots: int = NUM_SLOTS) -> SlotTable:
    return SlotTable(
        (M, RANK), num_slots=num_slots, max_tokens=16, device=torch.device("cpu"), dtype=torch.float32
    )


def pin(table: SlotTable, index: int) -> int:
    """Pin adapter `index`, which must get a slot, and return the slot."""
    slot = table.pin(ref(index), adapter(index))
    assert slot is not None
    return slot


def test_a_reused_slot_holds_only_the_new_adapter() -> None:
    table = make_table(num_slots=1)
    slot = table.pin(ref(1), adapter(1))
    assert slot == 1
    table.unpin(slot)

    assert table.pin(ref(2), adapter(2)) == slot
    table.load()
    assert torch.equal(table.R_slots[slot], adapter(2).R)
    assert ref(1) not in table
    assert table.num_evictions == 1


def test_dropping_leaves_zeros() -> None:
    table = make_table()
    slot = pin(table, 1)
    table.unpin(slot)
    table.load()
    table.drop(ref(1))
    assert not table.R_slots[slot].any()
    table.check_integrity()


def test_an_adapter_that_is_dropped_while_it_is_pinned_comes_again_in_another_slot() -> None:
    table = make_table()
    slots = [pin(table, 1), pin(table, 1)]
    table.load()
    table.drop(ref(1))
    assert ref(1) not in table

    again = table.pin(ref(1), adapter(2))
    table.load()
    assert again is not None
    assert again != slots[0] == slots[1]
    assert torch.equal(table.R_slots[slots[0]], adapter(1).R)
    table.unpin(slots[0])
    assert torch.equal(table.R_slots[slots[0]], adapter(1).R)
    table.unpin(slots[1])
    assert not table.R_slots[slots[0]].any()
    assert torch.equal(table.R_slots[again], adapter(2).R)
    assert (table.num_pinned, table.num_resident) == (1, 1)
    table.check_integrity()


def test_all_that_a_step_needs_is_loaded_together() -> None:
    table = make_table()
    slots = [table.pin(ref(index), adapter(index)) for index in (1, 2, 3)]
    assert not table.R_slots.any()

    table.stage(torch.tensor(slots))

    for index, slot in zip((1, 2, 3), slots, strict=True):
        assert torch.equal(table.R_slots[slot], adapter(index).R)


def test_an_adapter_that_was_unpinned_before_it_was_loaded_is_loaded_all_the_same() -> None:
    table = make_table()
    slot = pin(table, 1)
    table.unpin(slot)
    assert table.pin(ref(1), None) == slot
    table.load()
    assert torch.equal(table.R_slots[slot], adapter(1).R)


def test_what_was_to_be_loaded_is_forgotten_with_its_slot() -> None:
    table = make_table(num_slots=1)
    slot = pin(table, 1)
    table.unpin(slot)
    table.drop(ref(1))
    table.load()
    assert not table.R_slots[slot].any()

    table.unpin(pin(table, 2))
    table.pin(ref(3), adapter(3))  # evicts an adapter that was never loaded
    table.load()
    assert torch.equal(table.R_slots[slot], adapter(3).R)
    table.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored_as", [torch.float32, torch.float16, torch.int8], ids=str)
def test_a_packed_adapter_is_the_stored_one_in_the_dtype_of_the_slots(
    dtype: torch.dtype, stored_as: torch.dtype
) -> None:
    R = torch.randn(M, RANK, RANK, generator=torch.Generator().manual_seed(1))
    blob = Adapter("ab" * 32, R).to_bytes(version=3, dtype=stored_as)
    name = AdapterRef("t", "a", 3, "ab" * 32)

    packed = parse_adapter(name, blob, SlotFormat(dtype))

    assert isinstance(packed, PackedAdapter)
    assert (packed.R.dtype, packed.nbytes) == (dtype, M * RANK * RANK * dtype.itemsize)
    assert torch.equal(packed.R, Adapter.from_bytes(blob).R.to(dtype))
    assert isinstance(parse_adapter(name, blob[:-1], SlotFormat(dtype)), CorruptRecord)
    assert isinstance(parse_adapter(name, None, SlotFormat(dtype)), NotFound)


def test_a_version_that_holds_other_weights_than_were_resolved_is_not_taken_for_it() -> None:
    here, there = (Adapter("ab" * 32, torch.full((M, RANK, RANK), value)) for value in (1.0, 2.0))
    blob = here.to_bytes(version=3, dtype=torch.float32)
    packing = SlotFormat(torch.float32)
    name = AdapterRef("t", "a", 3, "ab" * 32, read_header(blob).checksum.hex())
    assert isinstance(parse_adapter(name, blob, packing), PackedAdapter)

    others = {
        "other weights": there.to_bytes(version=3, dtype=torch.float32),
        "another basis": Adapter("cd" * 32, here.R).to_bytes(version=3, dtype=torch.float32),
    }
    for other in others.values():
        found = parse_adapter(name, other, packing)
        assert isinstance(found, AdapterReplaced)
        assert "send the request again" in found.message
    assert isinstance(parse_adapter(name, blob[:-1], packing), CorruptRecord)


def test_a_pinned_slot_is_never_taken() -> None:
    table = make_table(num_slots=2)
    pinned, other = pin(table, 1), pin(table, 2)
    table.load()
    assert table.pin(ref(3), adapter(3)) is None
    table.unpin(other)
    assert table.pin(ref(3), adapter(3)) is not None
    assert torch.equal(table.R_slots[pinned], adapter(1).R)


def test_the_least_recently_used_slot_is_evicted() -> None:
    table = make_table(num_slots=2)
    for index in (1, 2, 1):
        table.unpin(pin(table, index))
    table.pin(ref(3), adapter(3))
    assert (ref(1) in table, ref(2) in table) == (True, False)


def test_versions_have_slots_of_their_own() -> None:
    table = make_table()
    assert table.pin(ref(1, version=1), adapter(1)) != table.pin(ref(1, version=2), adapter(2))


@given(st.lists(st.tuples(st.sampled_from(["pin", "unpin", "drop"]), st.integers(0, 5)), max_size=60))
def test_any_order_of_pins_and_drops_keeps_the_books(actions: list[tuple[str, int]]) -> None:
    table = make_table()
    pins: list[tuple[int, int]] = []  # (slot, value that it must hold)
    current: dict[int, int] = {}  # the value of each adapter, which changes after every drop
    for step, (action, index) in enumerate(actions):
        if action == "pin":
            value = current.setdefault(index, step + 1)
            named = ref(index) in table
            slot = table.pin(ref(index), adapter(value))
            assert (slot is None) == (len({slot for slot, _ in pins}) == NUM_SLOTS and not named)
            if slot is not None:
                pins.append((slot, value))
                table.load()
        elif action == "unpin" and pins:
            table.unpin(pins.pop(index % len(pins))[0])
        elif action == "drop":
            table.drop(ref(index))
            current.pop(index, None)
            assert ref(index) not in table
        table.check_integrity()
        assert table.num_pinned == len({slot for slot, _ in pins})
        assert all(torch.equal(table.R_slots[slot], adapter(value).R) for slot, value in pins)


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "hold", "release", "drop"]), st.integers(0, 6))))
def test_the_host_cache_keeps_its_limit_and_what_is_needed(actions: list[tuple[str, int]]) -> None:
    cache = AdapterCache(max_bytes=2 * adapter(0).R.nbytes)
    holds: list[int] = []
    present: set[int] = set()
    for action, index in actions:
        if action == "put":
            cache.put(ref(index), adapter(index))
            present.add(index)
        elif action == "get":
            found = cache.get(ref(index))
            assert found is None or torch.equal(found.R, adapter(index).R)
        elif action == "hold":
            cache.retain(ref(index))
            holds.append(index)
        elif action == "release" and index in holds:
            holds.remove(index)
            cache.release(ref(index))
        elif action == "drop":
            cache.drop(ref(index))
            present.discard(index)
        cache.check_integrity()
        assert all(ref(held) in cache for held in set(holds) & present)
        present = {held for held in present if ref(held) in cache}


def test_the_host_cache_evicts_the_least_recently_used() -> None:
    cache = AdapterCache(max_bytes=2 * adapter(0).R.nbytes)
    cache.put(ref(1), adapter(1))
    cache.put(ref(2), adapter(2))
    cache.get(ref(1))
    cache.put(ref(3), adapter(3))
    assert cache.refs == [ref(1), ref(3)]


def test_a_linear_layer_adds_each_tokens_own_delta(llama: Served) -> None:
    model = copy.deepcopy(llama.pristine)
    basis = llama.basis
    table = SlotTable(
        (basis.num_modules, basis.rank),
        num_slots=2,
        max_tokens=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    before = dict(iter_target_modules(model))
    attach(model, basis, table)
    refs = llama.refs[:2]
    packing = SlotFormat(torch.float32)
    slots = [table.pin(r, packing.pack(llama.adapters[r])) or 0 for r in refs]
    table.stage(torch.tensor([slots[0], 0, slots[1]]))

    for index, module in enumerate(basis.manifest.modules):
        linear = model.get_submodule(module.name)
        assert isinstance(linear, AdapterLinear)
        x = torch.randn(1, 3, module.d_in)
        y = linear(x)
        plain = torch.nn.functional.linear(x, linear.weight, linear.bias)
        torch.testing.assert_close(y[0, 1], plain[0, 1])
        for row, owner in ((0, refs[0]), (2, refs[1])):
            R = llama.adapters[owner].R[index]
            expected = plain[0, row] + delta(x[0, row], basis.A[index], R, basis.B[index])
            torch.testing.assert_close(y[0, row], expected)

    detach(model, basis.manifest)
    after = dict(iter_target_modules(model))
    assert all(after[name] is linear for name, linear in before.items())


def test_a_bias_is_kept() -> None:
    linear = AdapterLinear(torch.nn.Linear(3, 2))
    x = torch.randn(1, 4, 3)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize(
    "shape", [ModuleShape("no.such.module", 8, 8), ModuleShape("lm_head", 8, 8)], ids=str
)
def test_a_basis_of_another_model_changes_nothing(llama: Served, shape: ModuleShape) -> None:
    model = copy.deepcopy(llama.pristine)
    fitting = llama.basis.manifest.modules[0]
    factors = {m: (torch.randn(2, m.d_in), torch.randn(m.d_out, 2)) for m in (fitting, shape)}
    basis: Basis = make_basis(model_id="other", method="test", factors=factors, recipe={})
    with pytest.raises(BasisMismatch, match=shape.name):
        attach(model, basis, make_table())
    assert not any(isinstance(module, AdapterLinear) for module in model.modules())
