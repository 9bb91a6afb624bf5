"""The scale s of a job, with one meaning in both forms: delta_W = s B' R' A' and delta_W = s (B A - B_0 A_0).

    s = alpha / r          the papers' and PEFT's
    s = alpha / √r         rsLoRA (arXiv 2312.03732)

The scale is a matter of training: it is multiplied into what is stored. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tessera.errors import InvalidInput


@dataclass(frozen=True)
class Scaling:
    """What a job says about s. Where it says nothing, the basis or the LoRA form decides."""

    #: s itself, whatever the rank.
    scale: float | None = None
    #: α; None: r.
    alpha: float | None = None
    use_rslora: bool = False

    @property
    def is_given(self) -> bool:
        return self.scale is not None or self.alpha is not None or self.use_rslora

    def of(self, rank: int) -> float | None:
        """Return s of a module of this rank; None if the job says nothing."""
        if not self.is_given:
            return None
        if self.scale is not None:
            return self.scale
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def check(self) -> None:
        """Raise `InvalidInput` if s is given in two ways."""
        if self.scale is not None and (self.alpha is not None or self.use_rslora):
            other = "use_rslora" if self.alpha is None else "alpha"
            raise InvalidInput(f"scale is s itself, which {other} gives as well; leave one out", param=other)


NO_SCALING = Scaling()
