"""The initial factors of a LoRA form for every target module, and their layout in one tensor.

Knows no optimizer and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.defaults import LLAMA_LINEARS
from tessera.errors import InvalidInput
from tessera.formats.adapter_ref import MAX_RANK
from tessera.formats.manifest import ModuleShape
from tessera.methods.bases import CalibrationSet, build_basis_and_step
from tessera.methods.building.decomposition import module_seed
from tessera.methods.building.hebbian import HebbianConfig
from tessera.methods.building.targets import find_targets
from tessera.methods.forms import A_LEARNING_RATE, Given, LoraPreset, find_preset
from tessera.methods.scaling import NO_SCALING, Scaling
from tessera.model.base_model import BaseModel
from tessera.model.rank_pattern import module_ranks

#: The form of such a job in its specification.
LORA = "lora"


@dataclass(frozen=True)
class LoraFactors:
    """The factors A and B of every module."""

    preset: LoraPreset
    rank: int
    seed: int
    modules: tuple[ModuleShape, ...]
    #: One [r, d_in] per module, in float32 on the CPU.
    A: tuple[Tensor, ...]
    #: One [d_out, r] per module, in float32 on the CPU.
    B: tuple[Tensor, ...]
    #: The recipe of the factors, as JSON.
    recipe: dict[str, Any]
    #: What the job says about s.
    scaling: Scaling = NO_SCALING
    #: The local rule that trains A from the layer's inputs, if the form has one.
    online: HebbianConfig | None = None
    #: The rank of each module, if some have fewer than `rank`: the rows of A and columns of B beyond it are
    #: zero, and stay zero, because the gradient of either is a multiple of the other. Empty: all have `rank`.
    ranks: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        """s in delta_W = s (B A - B_0 A_0)."""
        return self._scale(self.rank)

    def scale_of(self, index: int) -> float:
        """s of one module."""
        return self._scale(self.ranks[index] if self.ranks else self.rank)

    def _scale(self, rank: int) -> float:
        return self.scaling.of(rank) or self.preset.scale(rank)

    @property
    def num_trained(self) -> int:
        """Number of parameters trained by the gradient."""
        ranks = self.ranks or (self.rank,) * len(self.modules)
        widths = (m.d_out + (m.d_in if self.preset.trains_A else 0) for m in self.modules)
        return sum(rank * width for rank, width in zip(ranks, widths, strict=True))


def initial_factors(
    base: BaseModel,
    preset: str | LoraPreset,
    *,
    rank: int,
    target_modules: Sequence[str] = LLAMA_LINEARS,
    calibration: CalibrationSet | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    scaling: Scaling = NO_SCALING,
    rank_pattern: Mapping[str, int] | None = None,
    **options: Any,
) -> LoraFactors:
    """A_0 and B_0 of one LoRA form.

    options: the form's own and its method's; what the preset sets takes precedence. progress(done, total) is
    called after each module that the method decomposes. scaling: s, if it is another than the form's, which
    the option `scale` may say as well; s B_0 A_0 stays what it is.

    Raises `InvalidInput` and `UnsupportedModel` like `build_basis`, and `InvalidInput` for a rank at which
    the result could not be stored: a subtracted product needs 2 r directions.
    """
    chosen = find_preset(preset) if isinstance(preset, str) else preset
    shapes = form_modules(base, chosen, rank=rank, target_modules=target_modules, rank_pattern=rank_pattern)
    option = options.pop("scale", None)
    scaling = scaling if scaling.is_given or option is None else Scaling(option)
    ranks = module_ranks([shape.name for shape in shapes], rank, rank_pattern)
    given_rank, rank = rank, max(ranks)
    scale = scaling.of(rank) or chosen.scale(rank)
    recipe: dict[str, Any] = {
        "form": "lora",
        "preset": chosen.name,
        "rank": rank,
        "seed": seed,
        "scale": scale,
    }
    online = chosen.local_rule(options)
    if online is not None:
        recipe[A_LEARNING_RATE] = online.lr
    if chosen.method is None:
        parts: Iterator[tuple[Tensor, Tensor, Tensor | None]] = (
            (torch.zeros(own, shape.d_in), torch.zeros(shape.d_out, own), None)
            for own, shape in zip(ranks, shapes, strict=True)
        )
    else:
        built = build_basis_and_step(
            base, method=chosen.method, rank=chosen.rank_factor * given_rank, target_modules=target_modules,
            rank_pattern={key: chosen.rank_factor * one for key, one in (rank_pattern or {}).items()} or None,
            calibration=calibration, progress=progress, **{"seed": seed, **chosen.method_options(options)},
        )  # fmt: skip
        recipe["basis"] = built.basis.manifest.recipe
        P_in, P_out, steps = built.basis.P_in, built.basis.P_out, built.step
        parts = (
            ((P_in[i] @ built.basis.A[i].float())[:k], (built.basis.B[i].float() @ P_out[i])[:, :k],
             None if steps is None else steps[i, :k, :k].float())
            for i, k in enumerate(chosen.rank_factor * own for own in ranks)
        )  # fmt: skip
    pairs = []
    for shape, own, (A, B, step) in zip(shapes, ranks, parts, strict=True):
        generator = torch.Generator().manual_seed(module_seed(seed, chosen.name, shape.name, own))
        A, B = chosen.initial(Given(A, B, step, generator))
        if bool(B.any()):
            ratio = chosen.scale(own) / (scaling.of(own) or chosen.scale(own))
            A, B = (X * ratio**0.5 for X in (A, B))
        pairs.append((F.pad(A, (0, 0, 0, rank - own)), F.pad(B, (0, rank - own))))
    A0, B0 = (tuple(pair[side].float().contiguous() for pair in pairs) for side in (0, 1))
    own_ranks = tuple(ranks) if rank_pattern else ()
    return LoraFactors(chosen, rank, seed, shapes, A0, B0, recipe, scaling, online, own_ranks)


def form_modules(
    base: BaseModel,
    preset: LoraPreset,
    *,
    rank: int,
    target_modules: Sequence[str],
    rank_pattern: Mapping[str, int] | None = None,
) -> tuple[ModuleShape, ...]:
    """Return the modules that the form changes. Raises the same errors as `initial_factors`."""
    targets = find_targets(base.model, target_modules, rank, rank_pattern)
    shapes = tuple(target.shape for target in targets)
    ranks = module_ranks([shape.name for shape in shapes], rank, rank_pattern)
    if rank_pattern and preset.online is not None:
        raise InvalidInput(f"the local rule of {preset.name} needs one rank", param="rank_pattern")
    sides = [(min(shape.d_in, shape.d_out), shape.name) for shape in shapes]
    _, side, narrow, rank = min(
        (side // preset.stored_rank(1) - own, side, name, own)
        for (side, name), own in zip(sides, ranks, strict=True)
    )
    if preset.stored_rank(rank) > side:
        raise InvalidInput(
            f"rank must be at most {side // 2} for {preset.name}, whose result has twice the rank and must "
            f"fit the smaller side {side} of {narrow}; got {rank}",
            param="rank",
        )
    rank = max(ranks)
    if preset.stored_rank(rank) > MAX_RANK:
        message = f"rank {rank} is stored as {preset.stored_rank(rank)} for {preset.name}, above {MAX_RANK}"
        raise InvalidInput(message, param="rank")
    return shapes


@dataclass(frozen=True)
class Layout:
    """The place of each module's A and B in one tensor [2, P]: A's in row 0, B's in row 1, padded with zeros.

    There are two rows because A and B may have different learning rates, and one tensor so that one kernel
    can step all modules of all runs.
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
        """Return A [..., r, d_in] and B [..., d_out, r] of each module in `packed` [..., 2, P]."""
        a = b = 0
        leading, r = packed.shape[:-2], self.rank
        for m in self.modules:
            A = packed[..., 0, a : a + r * m.d_in].view(*leading, r, m.d_in)
            B = packed[..., 1, b : b + r * m.d_out].view(*leading, m.d_out, r)
            a, b = a + r * m.d_in, b + r * m.d_out
            yield A, B
