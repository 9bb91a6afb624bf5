"""Slot loads on a GPU run beside the step on a stream of their own, and are never seen half done."""

from __future__ import annotations

import pytest
import torch

from service.engine.adapters.packed_adapter import SlotFormat
from service.engine.adapters.slots import SlotTable
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

M, RANK, NUM_SLOTS = 224, 16, 64
FORMAT = SlotFormat(torch.bfloat16, is_pinned=True)


def ref(index: int) -> AdapterRef:
    return AdapterRef("t", f"a{index}", 1, "00" * 32)


def make_table(num_slots: int = NUM_SLOTS) -> SlotTable:
    return SlotTable(
        (M, RANK), num_slots=num_slots, max_tokens=512, device=torch.device("cuda"), dtype=torch.bfloat16
    )


def adapter(value: float) -> Adapter:
    return Adapter("00" * 32, torch.full((M, RANK, RANK), value))


def test_a_step_finds_its_slots_loaded_however_busy_the_device_is() -> None:
    """Each round evicts all adapters, so a step that read too early would see the round before."""
    table = make_table()
    work = torch.randn(4096, 4096, device="cuda")
    sums = []
    for number in range(20):
        packed = [FORMAT.pack(adapter(number + index / 64)) for index in range(NUM_SLOTS)]
        refs = [ref(100 * number + index) for index in range(NUM_SLOTS)]
        slots = [table.pin(name, one) for name, one in zip(refs, packed, strict=True)]
        table.load()
        del packed  # its memory must not be reused before it is copied
        work = work @ work / 4096
        table.stage(torch.tensor(slots, device="cuda"))
        assert table.active is not None
        # Read here, as a step's tokens are: until then its slots stay pinned.
        sums.append(table.R_slots[table.active].float().mean((1, 2, 3)).cpu())
        for slot in slots:
            table.unpin(slot)
    for number, found in enumerate(sums):
        expected = torch.tensor([number + index / 64 for index in range(NUM_SLOTS)]).bfloat16().float()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    table.check_integrity()


def test_a_slot_that_is_dropped_while_it_is_being_loaded_ends_as_zeros() -> None:
    table = make_table(num_slots=1)
    for number in range(50):
        slot = table.pin(ref(number), FORMAT.pack(adapter(1.0)))
        table.load()
        assert slot is not None
        table.unpin(slot)
        table.drop(ref(number))
    table.stage(None)
    assert slot == 1
    assert not table.R_slots.any()


def test_a_replayed_graph_reads_what_was_loaded_since_its_capture() -> None:
    table = make_table(num_slots=2)
    table.pin(ref(1), FORMAT.pack(adapter(1.0)))
    table.stage(torch.tensor([1, 1], device="cuda"))
    assert table.active is not None
    active, out = table.active, torch.zeros(2, device="cuda")
    out.copy_(table.R_slots[active].float().mean((1, 2, 3)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(table.R_slots[active].float().mean((1, 2, 3)))
    slot = table.pin(ref(2), FORMAT.pack(adapter(2.0)))
    table.load()
    table.stage(torch.tensor([1, slot], device="cuda"))
    graph.replay()
    assert out.tolist() == [1.0, 2.0]
