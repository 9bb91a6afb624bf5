"""Which linear layers are adapted: by name, by default, and in models whose layers are `Conv1D`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.architectures.tiny_models import build, make_config
from tessera.defaults import LLAMA_LINEARS
from tessera.errors import UnsupportedModel
from tessera.model.base_model import BaseModel, iter_target_modules, linear_layers
from tessera.model.layout import linear_shapes
from tessera.model.target_modules import check_patterns, choose_targets

#: Architecture -> names of the default targets in its layers.
DEFAULTS = {
    "llama": set(LLAMA_LINEARS),
    "gemma3n_text": set(LLAMA_LINEARS),  # not its small gates and projections
    "qwen2_moe": set(LLAMA_LINEARS),  # not the gate of the shared expert
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_bigcode": {"c_attn", "c_proj", "c_fc"},
    "gptj": {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"},
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "nemotron": {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
    "starcoder2": {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"},
    "deepseek_v2": {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
        "gate_proj", "up_proj", "down_proj",
    },
    "phimoe": {"q_proj", "k_proj", "v_proj", "o_proj"},  # not the router
    "longcat_flash": {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
        "gate_proj", "up_proj", "down_proj",
    },
}  # fmt: skip


def meta_model(model_type: str) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(model_type))
    BaseModel(model_type, model_type, model)
    return model


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_the_default_means_the_linear_layers_of_any_architecture(model_type: str) -> None:
    found = [name for name, _ in iter_target_modules(meta_model(model_type))]
    assert {name.split(".")[-1] for name in found} == DEFAULTS[model_type]
    assert len(set(found)) == len(found)
    assert not any("lm_head" in name or "embed" in name for name in found)


def test_layers_of_other_towers_are_no_targets() -> None:
    model = meta_model("gemma3")
    assert isinstance(model.get_submodule("model.vision_tower.encoder.layers.0.self_attn.q_proj"), nn.Linear)
    assert not any("vision" in name for name in linear_layers(model))
    with pytest.raises(UnsupportedModel, match="no linear layer matches"):
        list(iter_target_modules(model, ["*.vision_tower.*.q_proj"]))


@pytest.mark.parametrize(
    ("patterns", "unmatched"),
    [
        (["q_proj", "v_porj"], "['v_porj']"),
        (["all-linear", "c_attn", "q_proj"], "['c_attn']"),
        (["q_proj", "lm_head"], "['lm_head']"),
        (["q_proj", "layers.0.mlp.up_proj", "[kv_proj"], "['layers.0.mlp.up_proj', '[kv_proj']"),
        (["x", "y"], "['x', 'y']"),
        ([], "[]"),
    ],
)
def test_every_pattern_that_a_user_asks_for_must_match_a_layer(patterns: list[str], unmatched: str) -> None:
    names = list(linear_layers(build(make_config("llama"))))
    with pytest.raises(UnsupportedModel) as refused:
        check_patterns(names, patterns)
    assert f"no linear layer matches {unmatched}; the model has ['down_proj'" in refused.value.message


def test_heads_are_no_targets_whatever_they_are_called() -> None:
    for model_type in ("biogpt", "gpt_neox", "modernbert-decoder", "bert", "xlm", "rwkv", "xlnet"):
        model = meta_model(model_type)
        assert model.get_output_embeddings() not in linear_layers(model).values(), model_type
    assert "lm_head.dense" not in linear_layers(meta_model("modernbert-decoder"))


def test_single_experts_are_targets_only_by_name() -> None:
    names = ["model.layers.0.mlp.experts.3.up_proj", "model.layers.0.self_attn.q_proj"]
    assert choose_targets(names, ["all-linear"]) == names[1:]
    assert choose_targets(names, LLAMA_LINEARS) == names[1:]
    assert choose_targets(names, ["up_proj"]) == names[:1]


def test_conv1d_becomes_the_same_linear_layer() -> None:
    model = build(make_config("gpt2"))
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, Conv1D)}
    base = BaseModel("gpt2", "gpt2", model)

    assert len(weights) == 16
    assert not any(isinstance(module, Conv1D) for module in base.model.modules())
    for name, weight in weights.items():
        linear = base.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape) == weight.T.shape
        assert linear.weight.data_ptr() == weight.data_ptr()  # nothing is copied
        assert linear.weight.requires_grad is weight.requires_grad
    torch.testing.assert_close(base.model(ids).logits, before)


def test_the_layout_tells_the_targets_of_a_gpt2_from_its_files(tmp_path: Path) -> None:
    model = build(make_config("gpt2"))
    model.save_pretrained(tmp_path)
    layers = linear_layers(BaseModel("gpt2", "gpt2", model).model)
    shapes = linear_shapes(tmp_path)
    assert list(shapes) == list(layers)
    assert {(shape.d_in, shape.d_out) for shape in shapes.values()} == {
        (layer.in_features, layer.out_features) for layer in layers.values()
    }
