"""The memory of the runs that are trained together: one slot each, in tensors over all slots.

K slots hold the trained numbers, m and v, which are as large as R unless the method trains fewer; and the
gradient and the folded core, each [K, M, r, r] (together in float32 1.1 MB per slot for an 8B Llama at
r = 16). There are more slots while searches need them. Knows no data and no rules of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessera.formats.basis import Basis
from trainer_worker.training.optimizers import BatchedOptimizer, UserStep
from trainer_worker.training.trainable_linear import Delta, RowOwners

if TYPE_CHECKING:
    from trainer_worker.training.trainer import CoreRun

#: The tensors of a member that are views of the slots' memory while it has a slot.
_TENSORS = ("R", "m", "v")


class Slots:
    """The members by slot, their numbers, and the deltas through which the model's layers use them."""

    def __init__(
        self,
        basis: Basis,
        num_slots: int,
        *,
        dtype: torch.dtype,
        layer_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dtype: of the trained numbers. layer_dtype: of A and B."""
        self._num_modules, self._rank = basis.num_modules, basis.rank
        self._dtype, self._device = dtype, device
        self._cores = basis.cores.to(device, dtype)
        self._A = [A.to(device, layer_dtype) for A in basis.A]
        self._B = [B.to(device, layer_dtype) for B in basis.B]
        #: Whose row is whose in the next pass.
        self.owners = RowOwners(torch.zeros(0, dtype=torch.int64, device=device))
        self.members: list[CoreRun | None] = []
        self._optimizer = self._make_optimizer(0)
        self.resize(num_slots)

    @property
    def num_slots(self) -> int:
        return len(self.members)

    def add(self, members: Sequence[CoreRun]) -> None:
        """Give each a slot; makes more slots if too few are free."""
        num_free = self.members.count(None)
        if len(members) > num_free:
            self.resize(self.num_slots - num_free + len(members))
        for member in members:
            slot = self.members.index(None)
            self.members[slot] = member
            for name in _TENSORS:
                getattr(self._optimizer, name)[slot].copy_(getattr(member, name))
        self._bind()

    def free(self, slot: int) -> None:
        """Give the slot's member its tensors back, on the CPU, and zero the slot."""
        member = self.at(slot)
        self.members[slot] = None
        for name in _TENSORS:
            memory = getattr(member, name)
            setattr(member, name, memory.cpu().clone())
            memory.zero_()

    def resize(self, num_slots: int) -> None:
        """Replace the slots by `num_slots`, not fewer than there are members, and move the members."""
        before = [(slot, member) for slot, member in enumerate(self.members) if member is not None]
        optimizer = self._make_optimizer(num_slots)
        for new, (old, _) in enumerate(before):
            for name in _TENSORS:
                getattr(optimizer, name)[new].copy_(getattr(self._optimizer, name)[old])
        self._optimizer = optimizer
        self.members = [member for _, member in before] + [None] * (num_slots - len(before))
        M, r = self._num_modules, self._rank
        # Module-major, so that each layer's part is contiguous and all gradients are parts of one tensor.
        self._core = torch.zeros(M, num_slots, r, r, dtype=self._dtype, device=self._device)
        self._grad = torch.zeros_like(self._core)
        #: s of each slot's modules, as a factor on that of the basis.
        self._scale = torch.ones(num_slots, M, 1, 1, dtype=self._dtype, device=self._device)
        self.deltas = [
            Delta(A, B, self._leaf(m), self.owners)
            for m, (A, B) in enumerate(zip(self._A, self._B, strict=True))
        ]
        self._bind()

    def at(self, slot: int) -> CoreRun:
        member = self.members[slot]
        assert member is not None
        return member

    def fold(self, *, without: Sequence[int] = ()) -> None:
        """Compute the cores that the layers use from the trained numbers; zero for the slots `without`."""
        with torch.no_grad():
            core = self._cores.expand(self._optimizer.R) * self._scale
            self._core.copy_(core.transpose(0, 1))
            for slot in without:
                self._core[:, slot].zero_()

    def zero_gradients(self) -> None:
        self._grad.zero_()

    def gradients(self) -> Tensor:
        """Return the gradient of each slot's loss with respect to its trained numbers."""
        core_grad = self._grad.transpose(0, 1)  # [K, M, r, r]
        return self._cores.gradient(self._optimizer.R, core_grad * self._scale)

    def optimize(self, gradients: Tensor, steps: Sequence[UserStep]) -> None:
        """Make one step of the optimizer in the slots of `steps`."""
        self._optimizer.step(gradients, steps)

    def _make_optimizer(self, num_slots: int) -> BatchedOptimizer:
        return BatchedOptimizer((num_slots, *self._cores.shape), dtype=self._dtype, device=self._device)

    def _bind(self) -> None:
        """Make the tensors of every member views of the slots' memory."""
        for slot, member in enumerate(self.members):
            if member is not None:
                self._scale[slot] = member.scale[:, None, None]
                for name in _TENSORS:
                    setattr(member, name, getattr(self._optimizer, name)[slot])

    def _leaf(self, module: int) -> Tensor:
        """R of one module for all slots, [K, r, r], as a leaf whose gradient is a part of `_grad`."""
        leaf = self._core[module].requires_grad_()
        leaf.grad = self._grad[module]
        return leaf
