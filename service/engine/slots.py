"""The slots of one basis: which adapters are resident on the device, and which of them are in use.

    R_slots[s] = R of the adapter in slot s        slot 0 holds zeros: the base model alone

A slot is free, pinned (a request in flight uses it) or idle (kept until another adapter needs its place,
least recently used first). Loading overwrites a slot whole and dropping zeroes it, so a reused slot leaves no
trace. A new version of an adapter is a new name, hence a new slot. Pinning gives an adapter its slot; its
bytes follow with those of all others that the step needs (`slot_loads.py`).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from adapter_core.adapter import AdapterRef
from service.engine.packed_adapter import PackedAdapter
from service.engine.slot_loads import SlotLoads

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
        self._pins: dict[AdapterRef, int] = {}
        self._idle: OrderedDict[AdapterRef, None] = OrderedDict()  # least recently used first

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._slot_of

    @property
    def refs(self) -> list[AdapterRef]:
        return list(self._slot_of)

    @property
    def num_resident(self) -> int:
        return len(self._slot_of)

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
            self.num_loads += 1
        self._idle.pop(ref, None)
        self._pins[ref] = self._pins.get(ref, 0) + 1
        return self._slot_of[ref]

    def unpin(self, ref: AdapterRef) -> None:
        """One request less uses the slot of `ref`."""
        self._pins[ref] -= 1
        if self._pins[ref] == 0:
            del self._pins[ref]
            self._idle[ref] = None

    def drop(self, ref: AdapterRef) -> bool:
        """Free the slot of `ref`, if it is idle or has none. False if it is pinned."""
        if ref in self._pins:
            return False
        if ref in self._slot_of:
            del self._idle[ref]
            slot = self._slot_of.pop(ref)
            self._loads.clear(slot)
            self._free.append(slot)
        return True

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
        used = list(self._slot_of.values())
        assert sorted(used + self._free) == list(range(1, self.num_slots + 1))
        assert self._idle.keys() | self._pins.keys() == self._slot_of.keys()
        assert not self._idle.keys() & self._pins.keys()
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
        return self._slot_of.pop(evicted)
