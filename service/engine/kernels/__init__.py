"""The ops of the adapter path: each fused op that reads a GEMM's output also applies R and B to it.

`ops_for` gives the implementation for a device, `reference.py` documents the ops, and `layouts.py` the
layouts of their arguments. No op waits for the device, and all are safe to capture in a CUDA graph: shapes
alone decide what is launched, never the slots. A row of slot 0 loads no R, and NaN in one slot reaches only
the rows of that slot. Importing this package does not import Triton.
"""

from __future__ import annotations

from types import ModuleType

import torch

from service.engine.kernels import reference
from service.engine.kernels.layouts import (
    ACTIVATIONS,
    MAX_SEGMENTS,
    NO_MODULE,
    PLAIN_ADD,
    AddedDelta,
    GroupDelta,
    GroupFactors,
    Norm,
    QKVShape,
    ResidualAdd,
    RowSquares,
    StepRows,
    stack_factors,
)
from service.engine.kernels.reference import adapter_delta, rank_delta

__all__ = [
    "ACTIVATIONS",
    "MAX_SEGMENTS",
    "NO_MODULE",
    "PLAIN_ADD",
    "AddedDelta",
    "GroupDelta",
    "GroupFactors",
    "Norm",
    "QKVShape",
    "ResidualAdd",
    "RowSquares",
    "StepRows",
    "adapter_delta",
    "ops_for",
    "rank_delta",
    "stack_factors",
]


def ops_for(device: torch.device) -> ModuleType:
    """Return the fused ops for tensors on `device`: Triton kernels on CUDA, otherwise the reference
    implementation."""
    if device.type != "cuda":
        return reference
    from service.engine.kernels import launch  # Triton need not be installed without CUDA

    return launch
