"""The slots of one basis: which adapters are resident on the device, which of them are in use, how they load.

    R_slots[s] = R of the adapter in slot s        slot 0 holds zeros: the base model alone

A slot is free, pinned (used by a request in flight) or idle (kept until another adapter needs its place; the
least recently used one goes first). Loading overwrites a whole slot and dropping zeroes it, so a reused slot
leaves no trace. The head of an adapter that classifies stays on the host, for as long as it has its slot. A
new version of an adapter is a new name, hence a new slot. Pinning gives an adapter its slot; its bytes follow
together with those of all others that the step needs. An adapter that is dropped while it is pinned loses its
name at once, and its slot when the last request has ended.

On CUDA the loads run on a stream of their own, beside the running step, and the next step waits for them on
the device; the host waits for nothing. Each adapter takes one copy, straight from its pinned memory:
gathering them first would move the same bytes through the host once more (115 kB at 8B, rank 16: about 10 µs,
as long as the launch that it saves; `benchmarks/engine/slot_loads.py` compares). On a CPU the copies are made
at once. A slot that is loaded or cleared was idle or free. The running step may still read it for a row of a
request that has ended meanwhile, whose result is dropped, and for no other row.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from service.engine.adapters.packed_adapter import PackedAdapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.head import ClassificationHead

BASE_SLOT = 0


class SlotLoads:
    """The loads into R_slots [S, M, r, r]: collected while a step is planned, then made together. Knows no
    adapter by name."""

    def __init__(self, R_slots: Tensor) -> None:
        self._R_slots = R_slots
        self._pending: dict[int, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None  # the end of the loads that no step has waited for yet
        if R_slots.is_cuda:
            self._stream = torch.cuda.Stream(R_slots.device)  # type: ignore[no-untyped-call]
            self.follow()  # the zeros
            R_slots.record_stream(self._stream)  # keeps its memory from reuse while this stream writes to it

    def add(self, slot: int, R: Tensor) -> None:
        """Let the next `start` copy R [M, r, r], in the slots' dtype, into a slot."""
        self._pending[slot] = R

    def clear(self, slot: int) -> None:
        """Zero a slot, after any load into it that is running, and forget a load that has not started."""
        self._pending.pop(slot, None)
        with self._on_stream():
            self._R_slots[slot].zero_()
        self._note_end()

    def start(self) -> None:
        """Make all copies. On CUDA this returns before they have ended."""
        if not self._pending:
            return
        with self._on_stream():
            for slot, R in self._pending.items():
                self._R_slots[slot].copy_(R, non_blocking=True)
        self._pending.clear()
        self._note_end()

    def wait(self) -> None:
        """Let everything that is launched on the current stream from now on come after the copies."""
        if self._done is not None:
            torch.cuda.current_stream(self._R_slots.device).wait_event(self._done)
            self._done = None

    def follow(self) -> None:
        """Let later copies and zeros wait for what was launched on the current stream. Callers that write to
        slots there need it."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._R_slots.device))

    def _on_stream(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _note_end(self) -> None:
        if self._stream is not None:
            self._done = self._stream.record_event()


class SlotTable:
    """`num_slots` slots for adapters of M modules and rank r, and a static buffer that maps tokens to
    slots."""

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
        #: [S, M, r, r] with S = num_slots + 1.
        self.R_slots = torch.zeros(num_slots + 1, num_modules, rank, rank, device=device, dtype=dtype)
        #: The slot of every token of the step, int64 [T]; None if the step has no adapter rows of this basis.
        #: A view of a buffer that never moves, as CUDA graphs require.
        self.active: Tensor | None = None
        self.num_loads = self.num_evictions = 0
        self._loads = SlotLoads(self.R_slots)
        self._token_slots = torch.zeros(max_tokens, device=device, dtype=torch.int64)
        self.nbytes = self.R_slots.nbytes + self._token_slots.nbytes
        self._free = list(range(num_slots, 0, -1))
        self._slot_of: dict[AdapterRef, int] = {}
        self._ref_of: dict[int, AdapterRef] = {}
        self._heads: dict[AdapterRef, ClassificationHead] = {}  # of those adapters that classify
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

    def pin(self, ref: AdapterRef, adapter: PackedAdapter | None) -> int | None:
        """Pin the slot of `ref` and return it; None while all slots are pinned. If `ref` is not resident, it
        gets a slot, to be loaded from `adapter`."""
        if ref not in self._slot_of:
            slot = self._take_slot()
            if slot is None:
                return None
            assert adapter is not None
            self._loads.add(slot, adapter.R)
            self._slot_of[ref] = slot
            self._ref_of[slot] = ref
            if adapter.head is not None:
                self._heads[ref] = adapter.head
            self.num_loads += 1
        self._idle.pop(ref, None)
        slot = self._slot_of[ref]
        self._pins[slot] = self._pins.get(slot, 0) + 1
        return slot

    def head_of(self, ref: AdapterRef) -> ClassificationHead | None:
        """Return the classification head of a resident adapter, if it has one."""
        return self._heads.get(ref)

    def unpin(self, slot: int) -> None:
        """Note that one request fewer uses this slot."""
        self._pins[slot] -= 1
        if self._pins[slot] == 0:
            del self._pins[slot]
            if slot in self._ref_of:
                self._idle[self._ref_of[slot]] = None
            else:
                self._clear(slot)

    def drop(self, ref: AdapterRef) -> None:
        """Forget `ref`. The next `pin` must pass its bytes again. Requests in flight keep the slot."""
        if ref in self._slot_of:
            slot = self._slot_of.pop(ref)
            del self._ref_of[slot]
            self._heads.pop(ref, None)
            if slot not in self._pins:
                del self._idle[ref]
                self._clear(slot)

    def load(self) -> None:
        """Start loading what was pinned since the last call. Call this as soon as a step is planned."""
        self._loads.start()

    def stage(self, token_slots: Tensor | None) -> None:
        """Set the slots of the next step's tokens: int64 [T], T up to max_tokens; None for base rows only.

        What is launched on the current stream afterwards finds the slots loaded. Call this before a CUDA
        graph is replayed, not inside one.
        """
        self._loads.start()
        self._loads.wait()
        if token_slots is None:
            self.active = None
        else:
            self.active = self._token_slots[: len(token_slots)].copy_(token_slots)

    def begin_self_check(self, R: Tensor) -> int:
        """Put R [M, r, r] into a free slot, for the self-check before any adapter is loaded. Return
        the slot."""
        slot = self._free[-1]
        self.R_slots[slot] = R.to(self.R_slots)
        return slot

    def end_self_check(self) -> None:
        """Clear that slot again, before the next load."""
        self.R_slots[self._free[-1]] = 0
        self._loads.follow()
        self.active = None

    def check_integrity(self) -> None:
        assert {slot: ref for ref, slot in self._slot_of.items()} == self._ref_of
        assert self._heads.keys() <= self._slot_of.keys()
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
        self._heads.pop(evicted, None)
        return slot

    def _clear(self, slot: int) -> None:
        self._loads.clear(slot)
        self._free.append(slot)
