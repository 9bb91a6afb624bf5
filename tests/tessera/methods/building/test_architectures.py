"""Gradients and inputs are collected right in other decoders than Llama, whose wiring differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, MistralConfig, Qwen3Config

from tessera.defaults import LLAMA_LINEARS
from tessera.methods.bases import CalibrationSet, build_basis
from tessera.methods.building.activations import SecondMoment
from tessera.methods.building.collected import Needs
from tessera.methods.building.gradients import collect
from tessera.methods.building.targets import find_targets
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "attn_implementation": "eager",
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "qwen3": (Qwen3Config(**SIZES, **HEADS), LLAMA_LINEARS),
    "mistral": (MistralConfig(**SIZES, **HEADS, sliding_window=8), LLAMA_LINEARS),
    "gemma2": (Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=3.0, sliding_window=8), LLAMA_LINEARS),
    "gpt_neox": (GPTNeoXConfig(**SIZES), ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
}


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_sb6_gradients_of_other_architectures(architecture: str, calibration: CalibrationSet) -> None:
    config, patterns = CONFIGS[architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    base = BaseModel(architecture, "0" * 64, model)
    targets = find_targets(model, patterns, 1)
    needs = Needs(gradient=True, inputs=lambda name, width: SecondMoment(width))

    collected = collect(base, targets, calibration, needs)

    for target in targets:
        target.linear.weight.requires_grad_()
    for token_ids, mask in calibration.examples:
        ids = torch.tensor([token_ids])
        labels = torch.where(torch.tensor([mask]), ids, -100)
        model(input_ids=ids, labels=labels).loss.backward()
    for target, statistics in zip(targets, collected, strict=True):
        plain = target.linear.weight.grad
        assert plain is not None
        scale = float(plain.abs().max())
        torch.testing.assert_close(statistics.g() / scale, plain / scale, rtol=0, atol=1e-4)
        assert isinstance(statistics.inputs, SecondMoment)
        assert statistics.inputs.num_tokens == calibration.num_tokens
        target.linear.weight.requires_grad_(False)
        target.linear.weight.grad = None
    basis = build_basis(base, method="lora_da", rank=4, target_modules=patterns, calibration=calibration)
    assert basis.num_modules == len(targets)
