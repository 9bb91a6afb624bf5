"""The public ops of the adapter path. `fused.py` and `layouts.py` document their meaning, shapes and errors.

The rest of the tree imports ops only from here. `reference.py` has the reference implementation of each.
Importing this package does not import Triton.
"""

from service.engine.kernels.fused import (
    ACTIVATIONS,
    add_deltas,
    add_residual,
    add_rms_norm,
    glu,
    qkv_rope,
    rms_norm,
)
from service.engine.kernels.layouts import (
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
    "add_deltas",
    "add_residual",
    "add_rms_norm",
    "glu",
    "qkv_rope",
    "rank_delta",
    "rms_norm",
    "stack_factors",
]
