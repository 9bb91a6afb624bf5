"""The basis that a job works in, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tessera.formats.basis import Basis


@dataclass(frozen=True)
class JobBasis:
    """A job's basis. step: [M, r, r], its method's own first step from the same data, if it has one."""

    basis: Basis
    origin: Literal["stored", "found", "built"]
    step: Tensor | None = None
