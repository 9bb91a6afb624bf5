"""Adapters in the form of the slots: one tensor in their dtype, in pinned memory if that makes a copy fast.

Packing (dequantising int8, rounding to the slots' dtype) happens once, when an adapter arrives and not when a
step waits for it, so that loading a slot is a single copy of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.formats.adapter import Adapter
from tessera.formats.head import ClassificationHead


@dataclass(frozen=True)
class PackedAdapter:
    """One adapter in host memory, ready to be copied into a slot."""

    basis_id: str
    #: [M, r, r], in the dtype of the slots, contiguous.
    R: Tensor
    #: Stays in host memory. None if the adapter does not classify.
    head: ClassificationHead | None = None

    @property
    def num_modules(self) -> int:
        return self.R.shape[0]

    @property
    def rank(self) -> int:
        return self.R.shape[1]

    @property
    def nbytes(self) -> int:
        return self.R.nbytes + (0 if self.head is None else self.head.nbytes)


@dataclass(frozen=True)
class SlotFormat:
    """The form that slots need."""

    dtype: torch.dtype
    #: Whether host copies are page-locked, so that host and device do not wait for each other during a copy.
    is_pinned: bool = False

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """Pack an adapter. Any thread may call this. Shares the adapter's memory if nothing has to change."""
        if not self.is_pinned:
            return PackedAdapter(adapter.basis_id, adapter.R.to(self.dtype).contiguous(), adapter.head)
        # torch reuses pinned memory: page-locking new memory would take longer than the load.
        R = torch.empty(adapter.R.shape, dtype=self.dtype, pin_memory=True)
        return PackedAdapter(adapter.basis_id, R.copy_(adapter.R), adapter.head)
