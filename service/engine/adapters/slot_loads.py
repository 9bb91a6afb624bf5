"""The copies that bring adapters into slots: collected while a step is planned, then made together.

On CUDA they run on a stream of their own, beside the step that is running, and the next step waits for them
on the device; the host waits for nothing. One copy per adapter, straight from its pinned memory: gathering
them first would move the same bytes once more through the host (115 kB at 8B, rank 16: about 10 µs, as long
as the launch that it saves; `benchmarks/slot_loads.py` compares). On a CPU the copies are made at once.

A slot that is being loaded or cleared was idle or free. The step that is under way may still read it for a
row of a request that has ended meanwhile, whose result is dropped, and for no other. Knows no adapter by
name.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


class SlotLoads:
    """Loads into R_slots [S, M, r, r]."""

    def __init__(self, R_slots: Tensor) -> None:
        self._R_slots = R_slots
        self._pending: dict[int, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None  # of the loads that no step has waited for yet
        if R_slots.is_cuda:
            self._stream = torch.cuda.Stream(R_slots.device)  # type: ignore[no-untyped-call]
            self.follow()  # the zeros
            R_slots.record_stream(self._stream)  # its memory is not reused while this stream writes to it

    def add(self, slot: int, R: Tensor) -> None:
        """Have R [M, r, r], in the slots' dtype, copied into a slot by the next `start`."""
        self._pending[slot] = R

    def clear(self, slot: int) -> None:
        """Zero a slot, after what was being loaded into it, and forget what was to be loaded."""
        self._pending.pop(slot, None)
        with self._on_stream():
            self._R_slots[slot].zero_()
        self._note_end()

    def start(self) -> None:
        """Make all copies. Returns before they have ended where the device makes them."""
        if not self._pending:
            return
        with self._on_stream():
            for slot, R in self._pending.items():
                self._R_slots[slot].copy_(R, non_blocking=True)
        self._pending.clear()
        self._note_end()

    def wait(self) -> None:
        """Let what is launched from now on, on the current stream, come after the copies started before."""
        if self._done is not None:
            torch.cuda.current_stream(self._R_slots.device).wait_event(self._done)
            self._done = None

    def follow(self) -> None:
        """Let the copies and zeros to come wait for what was launched on the current stream: for whoever
        writes to slots there."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._R_slots.device))

    def _on_stream(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _note_end(self) -> None:
        if self._stream is not None:
            self._done = self._stream.record_event()
