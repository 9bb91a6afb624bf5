"""A bound on the memory of building: what training a LoRA of the same rank on the same batches takes.

It is estimated from below, and counts what comes on top of the frozen model, which both need:

    state        A, B, their gradients and AdamW's two moments in float32: 16 r Σ (d_in + d_out) bytes
    inputs       of the target modules, kept until their gradient arrives; about half of the modules share
                 theirs (query, key and value; gate and up)
    activations  that the frozen model keeps for its own backward pass, measured in the first pass

This file knows no method. docs/methods.md ("Memory") says where a method needs more than the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.targets import Target


class MemoryBound:
    """The bound while one basis is built."""

    def __init__(self, targets: Sequence[Target], rank: int, calibration: CalibrationSet) -> None:
        width = sum(target.shape.d_in * target.weight.element_size() for target in targets)
        self._input_bytes = calibration.max_batch_tokens * width // 2
        self._factor_bytes = 4 * rank * sum(t.shape.d_in + t.shape.d_out for t in targets)
        #: The largest activations that a pass has measured so far.
        self.activation_bytes = 0

    def statistics_bytes(self, total_bytes: int) -> int:
        """Return how many bytes of statistics one pass may collect. total_bytes: S, those of all modules.

        A pass over a share f of the modules keeps f X of the inputs X and f S of the statistics. LoRA keeps X
        and its state P. The factors that are found take a quarter of P, and another quarter is left for
        intermediate results, so f X + f S <= X + P / 2.
        """
        extra = self._input_bytes + 2 * self._factor_bytes
        return int(total_bytes * min(1.0, extra / (self._input_bytes + total_bytes)))

    def working_bytes(self, statistics_bytes: int) -> int:
        """Return how many bytes a factorisation may use beside the statistics that are still held.

        The factors of all modules, in float32, are subtracted as if all had been found already.
        """
        return self._input_bytes + self.activation_bytes + 3 * self._factor_bytes - statistics_bytes

    @contextmanager
    def measured(self, model: nn.Module) -> Iterator[None]:
        """Record the bytes, beside parameters, that a forward pass in here keeps for its backward pass."""
        sizes: dict[int, int] = {}
        known = {_address(x) for x in (*model.parameters(), *model.buffers())}

        def note(x: Tensor) -> Tensor:
            if _address(x) not in known:
                sizes[_address(x)] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            yield
        self.activation_bytes = max(self.activation_bytes, sum(sizes.values()))


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
