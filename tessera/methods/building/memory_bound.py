"""How much memory building may take at once: what training LoRA of the same rank on the same batches takes.

Counted from below, above the frozen model, which both have:

    state        A, B, their gradients and AdamW's two moments, float32: 16 r Σ (d_in + d_out) bytes
    inputs       of the target modules, kept until their gradient comes; about half of the modules share
                 theirs (query, key and value; gate and up)
    activations  what the frozen model keeps for its own backward pass, measured in the first pass

Knows no method. What a method needs at least, whatever the bound: `docs/methods.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.targets import Target


class MemoryBound:
    """The bound for one building. activation_bytes: the most that a pass has seen so far."""

    def __init__(self, targets: Sequence[Target], rank: int, calibration: CalibrationSet) -> None:
        width = sum(target.shape.d_in * target.weight.element_size() for target in targets)
        self._input_bytes = calibration.max_batch_tokens * width // 2
        self._factor_bytes = 4 * rank * sum(t.shape.d_in + t.shape.d_out for t in targets)
        self.activation_bytes = 0

    def statistics_bytes(self, total_bytes: int) -> int:
        """What one pass may collect, of `total_bytes` for all modules.

        A pass over a share f of the modules keeps f of the inputs X and f of all statistics S; LoRA keeps X
        and its state, of which the factors that are found take a quarter and transients are left another:
        f X + f S <= X + P / 2.
        """
        extra = self._input_bytes + 2 * self._factor_bytes
        return int(total_bytes * min(1.0, extra / (self._input_bytes + total_bytes)))

    def working_bytes(self, statistics_bytes: int) -> int:
        """What a factorisation may use beside its own statistics and those that wait for theirs.

        The factors of all modules, in float32, are taken off as if they were found already.
        """
        return self._input_bytes + self.activation_bytes + 3 * self._factor_bytes - statistics_bytes

    @contextmanager
    def measured(self, model: nn.Module) -> Iterator[None]:
        """Note what a forward pass in here keeps for its backward pass, parameters left out."""
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
