"""Exporting an adapter as an ordinary LoRA, which PEFT, vLLM and every other LoRA runtime can load.

    delta_W = B R A = (B R) A      so     lora_A = A [r, d_in],   lora_B = B R [d_out, r],   lora_alpha = r

The export is exact up to its dtype, and 30 to 80 times larger than the adapter, because it contains a copy of
the factors of the basis. Leaving Tessera costs only bytes.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

from tessera.errors import BasisMismatch, InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.formats.head import ClassificationHead
from tessera.peft.files import PeftFiles

#: The name of the head in transformers' causal classes for sequence classification.
HEAD = "score"


def to_peft(
    basis: Basis, adapter: Adapter, *, base_model: str, dtype: torch.dtype = torch.float32
) -> PeftFiles:
    """Make the files of a PEFT LoRA with the same delta. base_model: value of `base_model_name_or_path`.

    An adapter with a classification head becomes a LoRA of transformers' class for sequence classification,
    which must be loaded with as many labels as the head has. Raises `BasisMismatch` if the adapter belongs to
    another basis, and `InvalidInput` for a head with a bias, which the causal classes do not have.
    """
    if adapter.basis_id != basis.basis_id:
        raise BasisMismatch(f"the adapter belongs to basis {adapter.basis_id}, not to {basis.basis_id}")
    tensors = {}
    for index, module in enumerate(basis.manifest.modules):
        name = f"base_model.model.{module.name}"
        tensors[f"{name}.lora_A.weight"] = basis.A[index].to(dtype).contiguous()
        lora_B = basis.B[index].float() @ adapter.R[index]
        tensors[f"{name}.lora_B.weight"] = lora_B.to(dtype).contiguous()
    if adapter.head is not None:
        tensors[f"base_model.model.{HEAD}.weight"] = _head_weight(adapter.head)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if adapter.head is None else "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "r": basis.rank,
        "lora_alpha": basis.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [module.name for module in basis.manifest.modules],
    }
    if adapter.head is not None:
        config["modules_to_save"] = [HEAD]
    metadata = {"format": "pt", "tessera_basis": basis.basis_id}
    return PeftFiles(json.dumps(config, indent=2).encode(), save(tensors, metadata=metadata))


def _head_weight(head: ClassificationHead) -> torch.Tensor:
    if head.weight[:, -1].any():
        raise InvalidInput(
            "the head of this adapter has a bias, and the head of a causal model for sequence classification "
            "has none; regressions and classifiers on encoders cannot be exported",
            param="adapter_id",
        )
    return head.weight[:, :-1].contiguous()
