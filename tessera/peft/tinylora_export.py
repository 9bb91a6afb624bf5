"""Exporting an adapter of trained numbers as the TinyLoRA that it is, for PEFT to go on training.

    A_m = P_in A,   B_m = B P_out,   P_m and v as they are:   delta_W = B_m (sum_i v_i P_mi) A_m

PEFT reads all of them from the file, so the export is exact up to float32. It is larger than the LoRA export
of the same adapter (`exporting.py`), and only PEFT loads it; what it keeps is the few numbers.
"""

from __future__ import annotations

import json

from safetensors.torch import save
from torch import Tensor

from tessera.errors import BasisMismatch, InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.formats.cores import SPANNED
from tessera.peft.files import PeftFiles
from tessera.peft.tinylora import PEFT_TYPE, groups_of


def to_tinylora(basis: Basis, adapter: Adapter, *, base_model: str) -> PeftFiles:
    """Make the files. base_model: value of `base_model_name_or_path`.

    The groups of tied modules are kept if PEFT can make the same ones; otherwise each module gets a copy of
    its vector, and training in PEFT would untie them. Raises `BasisMismatch`, and `InvalidInput` for an
    adapter that is not made of such numbers, or that has a head.
    """
    if adapter.basis_id != basis.basis_id:
        raise BasisMismatch(f"the adapter belongs to basis {adapter.basis_id}, not to {basis.basis_id}")
    core = basis.manifest.core
    if core["kind"] != SPANNED or adapter.trained is None or basis.projection is None:
        message = "this version is not stored as the numbers of a TinyLoRA; export it as LORA"
        raise InvalidInput(message, param="peft_type")
    if adapter.head is not None:
        raise InvalidInput("an adapter with a head is exported as LORA", param="peft_type")
    tensors: dict[str, Tensor] = {}
    for index, module in enumerate(basis.manifest.modules):
        k = min(basis.rank, module.d_in, module.d_out)
        A = basis.P_in[index].double() @ basis.A[index].double()
        B = basis.B[index].double() @ basis.P_out[index].double()
        parts = {"A": A[:k], "B": B[:, :k], "P": basis.projection[index][:, :k, :k]}
        for part, value in parts.items():
            tensors[f"base_model.model.{module.name}.tinylora_{part}"] = value.float().contiguous()
    weight_tying, groups = _tying(core["groups"])
    for group in range(max(groups) + 1):
        member = groups.index(group)
        vector = adapter.trained[0, core["groups"][member]]
        tensors[f"base_model.tinylora_v.{group}"] = vector.float().clone()
    config = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": basis.rank,
        "u": int(core["num_vectors"]),
        "weight_tying": weight_tying,
        "save_projection": True,
        "projection_seed": 0,
        "tinylora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [module.name for module in basis.manifest.modules],
    }
    return PeftFiles(json.dumps(config, indent=2).encode(), save(tensors, metadata={"format": "pt"}))


def _tying(groups: list[int]) -> tuple[float, list[int]]:
    """Return PEFT's `weight_tying` for these groups, and the groups; otherwise 0 and one per module."""
    weight_tying = 1 - (max(groups) + 1) / len(groups)
    if max(groups) == 0:
        weight_tying = 1.0
    if groups_of(len(groups), weight_tying) == list(groups):
        return weight_tying, list(groups)
    return 0.0, list(range(len(groups)))
