"""Models of published geometry with random weights, made on the device, and random bases and adapters for
them."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tessera.defaults import LLAMA_LINEARS
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.model.base_model import BaseModel, iter_target_modules

_LLAMA_3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5}
#: Llama 3.1 8B, Llama 3.2 1B, and what a CPU can turn.
GEOMETRIES = {
    "8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "small": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}
#: Adapters of a size that training gives: the outputs differ, the model does not break.
R_SCALE = 0.05


def random_model(geometry: str, *, device: torch.device, dtype: torch.dtype, max_position: int) -> BaseModel:
    """A Llama of one of GEOMETRIES. Never on the host: 8B take 16 GB there, and minutes."""
    config = LlamaConfig(
        **GEOMETRIES[geometry],
        max_position_embeddings=max_position,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    return BaseModel(f"llama-{geometry}", f"random-{geometry}", model.eval().to(device))


def random_basis(base: BaseModel, rank: int) -> Basis:
    """Orthonormal factors for all linear layers, not taken from the weights."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        ModuleShape(name, linear.in_features, linear.out_features): (
            torch.randn(rank, linear.in_features, generator=generator),
            torch.randn(linear.out_features, rank, generator=generator),
        )
        for name, linear in iter_target_modules(base.model, LLAMA_LINEARS)
    }
    return make_basis(model_id=base.model_id, method="random", factors=factors, recipe={})


def random_adapter(basis: Basis, index: int) -> Adapter:
    generator = torch.Generator().manual_seed(index)
    shape = (basis.num_modules, basis.rank, basis.rank)
    return Adapter(basis.basis_id, R_SCALE * torch.randn(shape, generator=generator))
