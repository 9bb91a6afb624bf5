"""The trial at load time: it refuses by name what the engine would serve wrongly, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel

from benchmarks.architectures import tiny_models
from service.engine.attention.masks import AttendsToLaterTokens, read_windows
from service.engine.attention.reference import NAME, implementation_of
from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from service.engine.trial.model_trial import difference, install_and_try
from tessera.errors import UnsupportedModel
from tessera.model.base_model import BaseModel
from tests.service.engine.models import SLIDING_WINDOW, family, svd_basis


def llama() -> PreTrainedModel:
    return copy.deepcopy(family("llama").pristine)


def tiny(model_type: str, **fields: Any) -> PreTrainedModel:
    return tiny_models.build(tiny_models.make_config(model_type, **fields))


def try_out(model: PreTrainedModel) -> dict[str, str]:
    return install_and_try(BaseModel("tried", "tried", model))[1]


class Changed(nn.Module):
    """A module with an output that `change` alters."""

    def __init__(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.module(x))


class Rows(nn.Module):
    """Computes some rows, or all rows in another order, as a mixture of experts does."""

    def __init__(self, linear: nn.Linear, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = linear
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        rows = self.order(x[0])
        y = x.new_zeros(*x.shape[:-1], self.inner.out_features)
        y[:, rows] = self.inner(x[:, rows])
        return y


class WithoutCall(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight)


def in_first_mlp(
    model: PreTrainedModel, name: str, make: Callable[[nn.Linear], nn.Module]
) -> PreTrainedModel:
    mlp = model.get_submodule("model.layers.0.mlp")
    setattr(mlp, name, make(getattr(mlp, name)))
    return model


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "phi3", "micro"])
def test_all_layers_of_common_models_can_carry_adapters(name: str) -> None:
    model = copy.deepcopy(family(name).pristine)
    assert try_out(model) == {}
    assert not any(hasattr(module, "factors") for module in model.modules())


def test_a_model_whose_top_keeps_another_name_of_attention_is_tried_as_it_is_served() -> None:
    """GOT-OCR2 is such a model: its vision tower cannot change its attention, so only the language model
    does."""
    model = tiny("got_ocr2")
    facts, unfit = install_and_try(BaseModel("ocr", "ocr", model))
    assert (facts.attends_itself, unfit) == (False, {})
    assert implementation_of(model) == NAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "qwen2_moe", "gpt2"])
def test_rounding_in_half_precision_is_no_fault(model_type: str, dtype: torch.dtype) -> None:
    assert try_out(tiny(model_type).to(dtype)) == {}


@pytest.mark.parametrize(
    "model_type", ["qwen2_moe", "ernie4_5_moe", "hy_v3", "laguna", "afmoe", "minimax_m3_vl_text"]
)
def test_shared_experts_that_see_tokens_without_a_batch_can_carry_adapters(model_type: str) -> None:
    model = tiny(model_type)
    shared = [
        name for name, module in model.named_modules() if "shared" in name and isinstance(module, nn.Linear)
    ]
    assert shared
    assert try_out(model) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_mixes_the_rows_of_a_batch_is_refused(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    layer = model.get_submodule("model.layers.1")
    layer.mlp = Changed(layer.mlp, lambda y: y - y.mean(1, keepdim=True))
    with pytest.raises(UnsupportedModel, match="different results when other sequences share its step"):
        try_out(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_with_state_outside_the_kv_cache_is_refused() -> None:
    model = llama()
    layer = model.get_submodule("model.layers.1")
    layer.mlp = Changed(
        layer.mlp, lambda y: y + F.pad(y, (0, 0, 1, 0))[:, :-1]
    )  # a convolution of two tokens
    with pytest.raises(
        UnsupportedModel, match="LlamaForCausalLM cannot be served: it gives a sequence different results"
    ):
        try_out(model)


def test_a_model_that_fails_by_itself_is_refused_with_its_own_words() -> None:
    model = llama()
    mlp = model.get_submodule("model.layers.1.mlp")

    def refuse_long(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[1] > 1:
            raise ValueError("no language has been chosen")

    mlp.register_forward_pre_hook(refuse_long)
    with pytest.raises(
        UnsupportedModel, match="fails on a short text by itself: no language has been chosen"
    ):
        try_out(model)


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 29,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
    }
    model = BertLMHeadModel(BertConfig(**sizes, num_hidden_layers=1)).eval()
    with pytest.raises(UnsupportedModel, match="its tokens attend to later ones"):
        try_out(model)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "data2vec-text"])
def test_a_model_that_numbers_positions_from_elsewhere_is_refused_with_that_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModel, match="does not number the positions of a text from 0"):
        try_out(tiny(model_type, is_decoder=True))


def test_a_layer_that_sees_some_tokens_only_is_refused_as_a_target_by_name() -> None:
    model = in_first_mlp(
        llama(), "up_proj", lambda linear: Rows(linear, lambda x: (x[:, 0] > 0).nonzero()[:, 0])
    )
    base = BaseModel("routed", "routed", model)
    engine = Engine(base, EngineConfig(num_blocks=8))
    message = r"layer model.layers.0.mlp.up_proj.inner cannot carry adapters: it sees \[1, \d+, 48\]"
    with pytest.raises(UnsupportedModel, match=message):
        engine.add_basis(svd_basis(base, 2, ("q_proj", "inner")))
    engine.add_basis(svd_basis(base, 2, ("q_proj", "up_proj", "down_proj")))
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_that_sees_the_tokens_in_another_order_is_refused_as_a_target_by_name(
    dtype: torch.dtype,
) -> None:
    model = in_first_mlp(
        llama().to(dtype), "up_proj", lambda linear: Rows(linear, lambda x: x[:, 0].argsort())
    )
    unfit = try_out(model)
    assert set(unfit) == {"model.layers.0.mlp.up_proj.inner"}
    assert "differ by" in unfit["model.layers.0.mlp.up_proj.inner"]


def test_a_layer_whose_weight_is_read_without_a_call_is_refused_as_a_target_by_name() -> None:
    model = in_first_mlp(llama(), "up_proj", WithoutCall)
    assert try_out(model) == {
        "model.layers.0.mlp.up_proj.inner": "the model reads its weight without calling it"
    }


class Pair(nn.Linear):
    """A module that is a linear layer by class, but computes more than a product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.sigmoid()


def test_a_layer_that_gives_more_than_a_product_is_refused_as_a_target_by_name() -> None:
    model = in_first_mlp(llama(), "up_proj", lambda linear: nn.Sequential(Pair(linear), First()))
    unfit = try_out(model)
    assert set(unfit) == {"model.layers.0.mlp.up_proj.0"}
    assert "fails" in unfit["model.layers.0.mlp.up_proj.0"]


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


def test_layers_that_text_does_not_reach_are_no_obstacle() -> None:
    model = llama()
    model.vision_tower = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert try_out(model) == {}


def test_windows_are_those_of_the_masks() -> None:
    assert read_windows(tiny("llama")) == dict.fromkeys(range(4))
    assert read_windows(tiny("mistral")) == dict.fromkeys(range(4), tiny_models.WINDOW)
    assert read_windows(tiny("mistral", sliding_window=131072)) == dict.fromkeys(range(4), 131072)
    assert read_windows(tiny("cohere2")) == {0: 11, 1: 11, 2: 11, 3: None}
    assert read_windows(tiny("olmoe", sliding_window=5)) == dict.fromkeys(range(4)), "its arguments say 5"
    with pytest.raises(AttendsToLaterTokens):
        read_windows(tiny("bert"))


def test_a_window_that_stands_in_the_mask_only_is_kept() -> None:
    facts, _ = install_and_try(BaseModel("phimoe", "phimoe", tiny("phimoe", sliding_window=5)))
    assert [options.sliding_window for options in facts.options] == [5] * 4
    assert facts.windows == dict.fromkeys(range(4), 5)


def test_a_window_of_the_arguments_only_is_none() -> None:
    facts, _ = install_and_try(BaseModel("olmoe", "olmoe", tiny("olmoe", sliding_window=5)))
    assert [options.sliding_window for options in facts.options] == [None] * 4
    gemma = family("gemma3").pristine
    facts, _ = install_and_try(BaseModel("gemma3", "gemma3", copy.deepcopy(gemma)))
    assert [options.sliding_window for options in facts.options] == [SLIDING_WINDOW, None, SLIDING_WINDOW]
    assert facts.windows == {}


def test_a_model_shorter_than_the_trial_can_be_tried() -> None:
    assert try_out(tiny("llama", max_position_embeddings=3)) == {}
    assert try_out(tiny("gpt2", n_positions=2)) == {}


def test_a_difference_is_of_the_worst_row_or_in_half_precision_of_most_rows() -> None:
    logits = torch.eye(5)
    other = logits.clone()
    other[0] = -other[0]
    assert difference(logits, logits + 7.0, torch.float32) == pytest.approx(0, abs=1e-6)
    assert difference(other, logits, torch.float32) == pytest.approx(2)
    assert difference(other, logits, torch.bfloat16) == 0
    other[0, 0] = float("nan")
    assert difference(other, logits, torch.bfloat16) == float("inf")
