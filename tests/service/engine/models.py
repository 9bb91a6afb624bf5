"""Small models with adapters that change the output, and the oracle: the same model with merged weights,
alone.

Does not import pytest, so that the same checks can run on a machine with only torch and transformers.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from tessera.defaults import BUNDLED_MODEL, LLAMA_LINEARS
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.model.base_model import BaseModel, iter_target_modules, load_base_model

#: Shorter than the context of every test, so that a window that is ignored or off by one shows.
SLIDING_WINDOW = 11
VOCAB_SIZE = 211
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # with the usual 0.02 all logits are nearly equal
    "tie_word_embeddings": False,  # with tied weights random models repeat their input
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
#: The smallest model, for tests of the code around it.
_MICRO = {**_SIZES, "vocab_size": 29, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
_GEMMA = {**_SIZES, "query_pre_attn_scalar": 16, "sliding_window": SLIDING_WINDOW}
_RANDOM_MODELS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _SIZES),
    "micro": (LlamaConfig, LlamaForCausalLM, _MICRO),
    "biased": (
        LlamaConfig,
        LlamaForCausalLM,
        {**_SIZES, "attention_bias": True, "mlp_bias": True, "rope_parameters": _ROPE},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {**_SIZES, "sliding_window": SLIDING_WINDOW}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, _SIZES),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, _SIZES),
    "phi3": (Phi3Config, Phi3ForCausalLM, {**_SIZES, "partial_rotary_factor": 0.5}),
    "gemma": (GemmaConfig, GemmaForCausalLM, _SIZES),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {**_GEMMA, **_CAPS}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            **_SIZES,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.5,
        },
    ),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, _SIZES),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {**_SIZES, "no_rope_layers": [1, 0, 1]}),
    # it has LayerNorm, so the generic path serves it
    "starcoder2": (Starcoder2Config, Starcoder2ForCausalLM, _SIZES),
}
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "tiny")
#: Further architectures of transformers that the fused path runs.
MORE_FAMILIES = ("biased", "qwen2", "phi3", "gemma", "gemma3", "granite", "olmo2", "smollm3")


@dataclass
class Served:
    """A base model, two bases for it, adapters of the first basis, and the expected output of each."""

    base: BaseModel
    basis: Basis
    other_basis: Basis
    adapters: dict[AdapterRef, Adapter] = field(default_factory=dict)
    _merged: dict[AdapterRef | None, PreTrainedModel] = field(default_factory=dict)

    @property
    def refs(self) -> list[AdapterRef]:
        return [ref for ref in self.adapters if ref.basis_id == self.basis.basis_id]

    @property
    def other_refs(self) -> list[AdapterRef]:
        return [ref for ref in self.adapters if ref.basis_id == self.other_basis.basis_id]

    @property
    def vocab_size(self) -> int:
        return int(self.base.model.config.vocab_size)

    def prompts(self, *lengths: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(3, self.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    def merged(self, ref: AdapterRef | None) -> PreTrainedModel:
        """The model with W + B R A in place of W."""
        if ref not in self._merged:
            model = copy.deepcopy(self.pristine)
            if ref is not None:
                basis = self.basis if ref.basis_id == self.basis.basis_id else self.other_basis
                R = self.adapters[ref].R
                for index, module in enumerate(basis.manifest.modules):
                    weight = model.get_submodule(module.name).weight
                    weight.data += (basis.B[index] @ R[index] @ basis.A[index]).to(weight)
            self._merged[ref] = model
        return self._merged[ref]

    def __post_init__(self) -> None:
        self.pristine = copy.deepcopy(self.base.model)  # the engine owns `base.model`
        self.pristine.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)

    def oracle(
        self, ref: AdapterRef | None, prompt: list[int], num_tokens: int
    ) -> tuple[list[int], list[float]]:
        """The greedy tokens of the merged model run alone, and their log-probabilities."""
        model = self.merged(ref)
        output = model.generate(
            torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=model.device),
            max_new_tokens=num_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, len(prompt) :].tolist()
        logprobs = [
            float(row[0].float().log_softmax(-1)[token])
            for row, token in zip(output.logits, tokens, strict=True)
        ]
        return tokens, logprobs

    def prompt_oracle(self, ref: AdapterRef | None, prompt: list[int]) -> torch.Tensor:
        """The log-probabilities [len(prompt) - 1, V] for the tokens of the prompt from the second on."""
        model = self.merged(ref)
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.tensor([prompt], device=model.device)).logits
        return logits[0, :-1].float().log_softmax(-1)


def make_served(base: BaseModel, *, rank: int = 4, num_adapters: int = 4, scale: float = 1.0) -> Served:
    """A served model with random adapters: `num_adapters` in a basis of all linear layers, and two in a basis
    of attention's layers."""
    basis = svd_basis(base, rank, (*LLAMA_LINEARS, "qkv_proj", "gate_up_proj"))
    other = svd_basis(base, rank + 1, ("q_proj", "v_proj", "qkv_proj"))
    served = Served(base, basis, other)
    generator = torch.Generator().manual_seed(7)
    for name, (own, count) in {"a": (basis, num_adapters), "b": (other, 2)}.items():
        for index in range(count):
            R = scale * torch.randn(own.num_modules, own.rank, own.rank, generator=generator)
            ref = AdapterRef("default", f"{name}{index}", 1, own.basis_id)
            served.adapters[ref] = Adapter(own.basis_id, R)
    return served


def svd_basis(base: BaseModel, rank: int, target_modules: tuple[str, ...]) -> Basis:
    """A basis of the first singular vectors of each weight, directions in which an adapter has an effect."""
    factors = {}
    for name, linear in iter_target_modules(base.model, target_modules):
        U, _, Vh = torch.linalg.svd(linear.weight.cpu(), full_matrices=False)
        factors[ModuleShape(name, linear.in_features, linear.out_features)] = (Vh[:rank], U[:, :rank])
    return make_basis(model_id=base.model_id, method="svd", factors=factors, recipe={})


def more_adapters(served: Served, count: int, basis: Basis | None = None) -> dict[AdapterRef, Adapter]:
    """Random adapters without an oracle, in the first basis unless another is given."""
    basis = basis or served.basis
    generator = torch.Generator().manual_seed(1)
    return {
        AdapterRef("default", f"more{index}", 1, basis.basis_id): Adapter(
            basis.basis_id, torch.randn(basis.num_modules, basis.rank, basis.rank, generator=generator)
        )
        for index in range(count)
    }


def more_bases(served: Served, count: int) -> list[Basis]:
    """Small bases of one target module, for the same model."""
    module = served.basis.manifest.modules[0]
    generator = torch.Generator().manual_seed(2)
    return [
        make_basis(
            model_id=served.base.model_id,
            method="test",
            factors={
                module: (
                    torch.randn(2, module.d_in, generator=generator),
                    torch.randn(module.d_out, 2, generator=generator),
                )
            },
            recipe={},
        )
        for _ in range(count)
    ]


@functools.cache
def family(name: str, device: str = "cpu") -> Served:
    """One of the random small models, with fixed seeds, or the bundled one, "tiny"."""
    if name == "tiny":
        return make_served(load_base_model(BUNDLED_MODEL, device=device, dtype="float32"), rank=8, scale=0.4)
    return make_served(BaseModel(name, f"random-{name}", random_model(name).to(device)))


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    config_class, model_class, sizes = _RANDOM_MODELS[name]
    model = model_class(config_class(**sizes))
    randomise_vectors(model)
    model.requires_grad_(False)
    return model.eval()


def randomise_vectors(model: PreTrainedModel) -> None:
    """Randomise norms and biases: all ones and all zeros would hide errors in their use."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
