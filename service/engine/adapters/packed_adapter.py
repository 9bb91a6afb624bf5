"""Adapters as slots want them: one tensor in the slots' dtype, in pinned memory where that makes a copy fast.

Packing (dequantising int8, rounding to the slots' dtype) happens once, where an adapter arrives and not where
a step waits for it: loading a slot is one copy of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.formats.adapter import Adapter


@dataclass(frozen=True)
class PackedAdapter:
    """R: [M, r, r], in the dtype of the slots, contiguous, in host memory."""

    basis_id: str
    R: Tensor

    @property
    def num_modules(self) -> int:
        return self.R.shape[0]

    @property
    def rank(self) -> int:
        return self.R.shape[1]

    @property
    def nbytes(self) -> int:
        return self.R.nbytes


@dataclass(frozen=True)
class SlotFormat:
    """dtype: of the slots. is_pinned: whether host copies are page-locked, so that a copy to the device does
    not wait for the device and the device does not wait for the host."""

    dtype: torch.dtype
    is_pinned: bool = False

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """May be called in any thread. Shares the adapter's memory where nothing has to be changed."""
        if not self.is_pinned:
            return PackedAdapter(adapter.basis_id, adapter.R.to(self.dtype).contiguous())
        # From the pinned memory that torch keeps for reuse: page-locking anew takes longer than the load.
        R = torch.empty(adapter.R.shape, dtype=self.dtype, pin_memory=True)
        return PackedAdapter(adapter.basis_id, R.copy_(adapter.R))
