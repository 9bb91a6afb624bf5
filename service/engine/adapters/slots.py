"""The slots of one basis: which adapters are resident on the device, and which of them are in use.

    R_slots[s] = R of the adapter in slot s        slot 0 holds zeros: the base model alone

A slot is free, pinned (a request in flight uses it) or idle (kept until another adapter needs its place,
least recently used first). Loading overwrites a slot whole and dropping zeroes it, so a reused slot leaves no
trace. A new version of an adapter is a new name, hence a new slot. Pinning gives an adapter its slot; its
bytes follow with those of all others that the step needs (`slot_loads.py`). An adapter that is dropped while
it is pinned loses its name at once and its slot when the last request has ended.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from service.engine.adapters.packed_adapter import PackedAdapter
from service.engine.adapters.slot_loads import SlotLoads
from tessera.formats.adapter_ref import AdapterRef

BASE_SLOT = 0


class SlotTable:
    """`num_slots` slots for adapters of M modules and rank r, and a static buffer that maps tokens to slots.

    R_slots: [S, M, r, r] with S = num_slots + 1. active: int64 [T], the slot of every token of the step, a
    view of a buffer that never moves (CUDA graphs); None where the step has only base rows for this basis.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        num_slots: int,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        num_modules, rank = shape
        self.num_slots = num_slots
        self.R_slots = torch.zeros(num_slots + 1, num_modules, rank, rank, device=device, dtype=dtype)
        self.active: Tensor | None = None
        self.num_loads = self.num_evictions = 0
        self._loads = SlotLoads(self.R_slots)
        self._token_slots = torch.zeros(max_tokens, device=device, dtype=torch.int64)
        self._free = list(range(num_slots, 0, -1))
        self._slot_of: dict[AdapterRef, int] = {}
        self._ref_of: dict[int, AdapterRef] = {}
        self._pins: dict[int, int] = {}  # slot → requests in flight that use it
        self._idle: OrderedDict[AdapterRef, None] = OrderedDict()  # least recently used first

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._slot_of

    @property
    def refs(self) -> list[AdapterRef]:
        return list(self._slot_of)

    @property
    def num_resident(self) -> int:
        return self.num_slots - len(self._free)

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    @property
    def nbytes(self) -> int:
        return self.R_slots.nbytes + self._token_slots.nbytes

    def pin(self, ref: AdapterRef, adapter: PackedAdapter | None) -> int | None:
        """The slot of `ref`, to be loaded from `adapter` if it is not resident; None while all are pinned."""
        if ref not in self._slot_of:
            slot = self._take_slot()
            if slot is None:
                return None
            assert adapter is not None
            self._loads.add(slot, adapter.R)
            self._slot_of[ref] = slot
            self._ref_of[slot] = ref
            self.num_loads += 1
        self._idle.pop(ref, None)
        slot = self._slot_of[ref]
        self._pins[slot] = self._pins.get(slot, 0) + 1
        return slot

    def unpin(self, slot: int) -> None:
        """One request less uses this slot."""
        self._pins[slot] -= 1
        if self._pins[slot] == 0:
            del self._pins[slot]
            if slot in self._ref_of:
                self._idle[self._ref_of[slot]] = None
            else:
                self._clear(slot)

    def drop(self, ref: AdapterRef) -> None:
        """Forget `ref`: whoever pins it from now on brings its bytes. Requests in flight keep the slot."""
        if ref in self._slot_of:
            slot = self._slot_of.pop(ref)
            del self._ref_of[slot]
            if slot not in self._pins:
                del self._idle[ref]
                self._clear(slot)

    def load(self) -> None:
        """Start loading what was pinned since the last call. Call it as soon as a step is planned."""
        self._loads.start()

    def stage(self, token_slots: Tensor | None) -> None:
        """Set the slots of the next step's tokens: int64 [T], T up to max_tokens; None for base rows only.

        What is launched on the current stream afterwards finds the slots loaded. Call it before a CUDA graph
        is replayed, not inside one.
        """
        self._loads.start()
        self._loads.wait()
        if token_slots is None:
            self.active = None
        else:
            self.active = self._token_slots[: len(token_slots)].copy_(token_slots)

    def begin_trial(self, R: Tensor) -> int:
        """Put R [M, r, r] into a free slot for steps that are no requests', before any adapter is loaded."""
        slot = self._free[-1]
        self.R_slots[slot] = R.to(self.R_slots)
        return slot

    def end_trial(self) -> None:
        """Clear that slot again, before whatever is loaded next."""
        self.R_slots[self._free[-1]] = 0
        self._loads.follow()
        self.active = None

    def check_integrity(self) -> None:
        assert {slot: ref for ref, slot in self._slot_of.items()} == self._ref_of
        idle = {self._slot_of[ref] for ref in self._idle}
        assert sorted([*idle, *self._pins, *self._free]) == list(range(1, self.num_slots + 1))
        assert idle <= self._ref_of.keys() <= idle | self._pins.keys()
        assert all(count > 0 for count in self._pins.values())
        self._loads.wait()
        assert not self.R_slots[BASE_SLOT].any()
        assert not self.R_slots[self._free].any()

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        evicted, _ = self._idle.popitem(last=False)
        self.num_evictions += 1
        slot = self._slot_of.pop(evicted)
        del self._ref_of[slot]
        return slot

    def _clear(self, slot: int) -> None:
        self._loads.clear(slot)
        self._free.append(slot)
