"""The factors that a LoRA form begins with, for every target module, and where they lie in one vector.

Knows no optimiser and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.defaults import LLAMA_LINEARS
from tessera.errors import InvalidInput
from tessera.formats.adapter_ref import MAX_RANK
from tessera.formats.manifest import ModuleShape
from tessera.methods.bases import CalibrationSet, build_basis_and_step
from tessera.methods.building.decomposition import module_seed
from tessera.methods.building.targets import find_targets
from tessera.methods.forms import Given, LoraPreset, find_preset
from tessera.model.base_model import BaseModel


@dataclass(frozen=True)
class LoraFactors:
    """A[i]: [r, d_in], B[i]: [d_out, r] float32 on the CPU for module i; s = `scale`. recipe: JSON."""

    preset: LoraPreset
    rank: int
    seed: int
    modules: tuple[ModuleShape, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    recipe: dict[str, Any]

    @property
    def scale(self) -> float:
        return self.preset.scale(self.rank)

    @property
    def num_trained(self) -> int:
        """How many numbers the gradient trains."""
        width = sum(m.d_out + (m.d_in if self.preset.trains_A else 0) for m in self.modules)
        return self.rank * width


def initial_factors(
    base: BaseModel,
    preset: str | LoraPreset,
    *,
    rank: int,
    target_modules: Sequence[str] = LLAMA_LINEARS,
    calibration: CalibrationSet | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> LoraFactors:
    """A_0 and B_0 of one LoRA form. options: of its method, before the preset's own. progress(done, total)
    counts the modules of a method.

    Raises `InvalidInput` and `UnsupportedModel` as `build_basis`, and for a rank at which the result could
    not be stored: a subtracted product needs 2 r directions.
    """
    chosen = find_preset(preset) if isinstance(preset, str) else preset
    shapes = form_modules(base, chosen, rank=rank, target_modules=target_modules)
    recipe: dict[str, Any] = {
        "form": "lora",
        "preset": chosen.name,
        "rank": rank,
        "seed": seed,
        "scale": chosen.scale(rank),
    }
    if chosen.method is None:
        parts: Iterator[tuple[Tensor, Tensor, Tensor | None]] = (
            (torch.zeros(rank, shape.d_in), torch.zeros(shape.d_out, rank), None) for shape in shapes
        )
    else:
        built = build_basis_and_step(
            base, method=chosen.method, rank=chosen.rank_factor * rank, target_modules=target_modules,
            calibration=calibration, progress=progress, **{"seed": seed, **options, **chosen.options},
        )  # fmt: skip
        recipe["basis"] = built.basis.manifest.recipe
        P_in, P_out, steps = built.basis.P_in, built.basis.P_out, built.step
        parts = (
            (P_in[i] @ built.basis.A[i].float(), built.basis.B[i].float() @ P_out[i],
             None if steps is None else steps[i].float())
            for i in range(len(shapes))
        )  # fmt: skip
    pairs = []
    for shape, (A, B, step) in zip(shapes, parts, strict=True):
        generator = torch.Generator().manual_seed(module_seed(seed, chosen.name, shape.name, rank))
        pairs.append(chosen.initial(Given(A, B, step, generator)))
    A0, B0 = (tuple(pair[side].float().contiguous() for pair in pairs) for side in (0, 1))
    return LoraFactors(chosen, rank, seed, shapes, A0, B0, recipe)


def form_modules(
    base: BaseModel, preset: LoraPreset, *, rank: int, target_modules: Sequence[str]
) -> tuple[ModuleShape, ...]:
    """The modules that the form changes. Raises as `initial_factors`."""
    shapes = tuple(target.shape for target in find_targets(base.model, target_modules, rank))
    side, narrow = min((min(shape.d_in, shape.d_out), shape.name) for shape in shapes)
    if preset.stored_rank(rank) > side:
        raise InvalidInput(
            f"rank must be at most {side // 2} for {preset.name}, whose result has twice the rank and must "
            f"fit the smaller side {side} of {narrow}; got {rank}",
            param="rank",
        )
    if preset.stored_rank(rank) > MAX_RANK:
        message = f"rank {rank} is stored as {preset.stored_rank(rank)} for {preset.name}, above {MAX_RANK}"
        raise InvalidInput(message, param="rank")
    return shapes


@dataclass(frozen=True)
class Layout:
    """Where A and B of each module lie in one tensor [2, P]: row 0 all A's, row 1 all B's, zeros at the end.

    Two rows, because the two may have their own learning rates, and one tensor, because one kernel then steps
    all modules of all runs.
    """

    modules: tuple[ModuleShape, ...]
    rank: int

    @property
    def width(self) -> int:
        """P."""
        return self.rank * max(sum(m.d_in for m in self.modules), sum(m.d_out for m in self.modules))

    def pack(self, A: Sequence[Tensor], B: Sequence[Tensor]) -> Tensor:
        """[2, P] float32."""
        packed = torch.zeros(2, self.width)
        for index, (target_A, target_B) in enumerate(self.views(packed)):
            target_A.copy_(A[index])
            target_B.copy_(B[index])
        return packed

    def views(self, packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A [..., r, d_in] and B [..., d_out, r] of each module in `packed` [..., 2, P]."""
        a = b = 0
        leading, r = packed.shape[:-2], self.rank
        for m in self.modules:
            A = packed[..., 0, a : a + r * m.d_in].view(*leading, r, m.d_in)
            B = packed[..., 1, b : b + r * m.d_out].view(*leading, m.d_out, r)
            a, b = a + r * m.d_in, b + r * m.d_out
            yield A, B
