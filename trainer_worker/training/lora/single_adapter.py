"""A trained LoRA form as a single adapter: a private basis, stored and served like every other.

    delta_W = s (B A - B_0 A_0) = s [B, -B_0] [A; A_0]

The conversion is exact. The rank is 2 r where an initial product was subtracted and A has been trained, and r
otherwise (`tessera/formats/single_adapter.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.formats.single_adapter import LowRank, SingleAdapter, make_single_adapter
from tessera.model.base_model import BaseModel
from trainer_worker.training.lora.factors import LoraFactors

#: The method in the manifest of such a basis.
METHOD = "lora_form"


def to_single_adapter(
    factors: LoraFactors,
    trained: Sequence[tuple[Tensor, Tensor]],
    *,
    model_id: str,
    learning_rate: float,
    metadata: dict[str, Any],
    dtype: str = "float32",
) -> SingleAdapter:
    """Return the trained factors as a basis and its adapter.

    factors: what training began with. trained: A and B of each module afterwards. learning_rate: for the
    recipe of the basis. metadata: of the adapter. dtype: of the stored factors.
    """
    changes = {}
    initial = zip(factors.modules, factors.A, factors.B, strict=True)
    for index, ((A, B), (shape, A0, B0)) in enumerate(zip(trained, initial, strict=True)):
        A, B = A.detach().cpu(), B.detach().cpu()
        if factors.preset.is_subtracted and not factors.preset.trains_A:
            B = B.double() - B0.double()
        elif factors.preset.is_subtracted:
            A, B = torch.cat([A, A0.to(A)]), torch.cat([B, -B0.to(B)], dim=1)
        changes[shape] = LowRank(A, B, factors.scale_of(index))
    return make_single_adapter(
        changes, model_id=model_id, method=METHOD, metadata=metadata, dtype=dtype,
        recipe={**factors.recipe, "learning_rate": learning_rate},
    )  # fmt: skip


def storage_dtype(base: BaseModel) -> str:
    """Return the dtype in which a trained basis is stored.

    A model in half precision serves its factors in its own dtype, which is no finer than float16 for
    orthonormal ones.
    """
    return "float32" if base.model.dtype in (torch.float32, torch.float64) else "float16"
