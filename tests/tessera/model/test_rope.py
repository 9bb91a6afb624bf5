"""One set of rotations per model, independent of the other texts in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from tessera.model.base_model import BaseModel
from tessera.model.rope import depends_on_batch, pin_rotations

ORIGINAL = 32
_SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
}


def phi3() -> PreTrainedModel:
    config = Phi3Config(**_SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=_LONGROPE)
    return Phi3ForCausalLM(config).eval()


def phimoe() -> PreTrainedModel:
    """Scales cosine and sine by the longest position as well."""
    scales = {"short_mscale": 1.1, "long_mscale": 1.7}
    config = PhimoeConfig(**_SIZES, num_local_experts=2, rope_parameters={**_LONGROPE, **scales})
    return PhimoeForCausalLM(config).eval()


def dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(
        LlamaConfig(**{**_SIZES, "max_position_embeddings": ORIGINAL}, rope_parameters=rope)
    ).eval()


def rotary(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule("model.rotary_emb")


def rotate(model: PreTrainedModel, *positions: int) -> list[Tensor]:
    return list(rotary(model)(torch.empty(0), torch.tensor([positions])))


@pytest.mark.parametrize("make", [phi3, phimoe, dynamic])
def test_a_rotation_depends_on_its_neighbours_unless_it_is_pinned(make: Any) -> None:
    free, pinned = make(), make()
    pin_rotations(pinned, 200)
    alone, beside = ([part[:, :3] for part in rotate(free, 0, 1, 2, *more)] for more in ((), (150,)))
    assert not all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))
    alone, beside = ([part[:, :3] for part in rotate(pinned, 0, 1, 2, *more)] for more in ((), (150,)))
    assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))


@pytest.mark.parametrize("make", [phi3, phimoe])
@pytest.mark.parametrize(("num_positions", "longest"), [(ORIGINAL, ORIGINAL - 1), (ORIGINAL + 1, ORIGINAL)])
def test_the_longest_text_chooses_the_set(make: Any, num_positions: int, longest: int) -> None:
    free, pinned = make(), make()
    pin_rotations(pinned, num_positions)
    expected = [part[:, :2] for part in rotate(free, 3, 7, longest)]
    for got, want in zip(rotate(pinned, 3, 7), expected, strict=True):
        assert got.shape == (1, 2, 8)
        assert torch.equal(got, want)


def test_short_and_long_factors_are_not_the_same() -> None:
    short, long = phi3(), phi3()
    pin_rotations(short, ORIGINAL)
    pin_rotations(long, ORIGINAL + 1)
    assert not torch.equal(rotate(short, 3, 7)[0], rotate(long, 3, 7)[0])


def test_a_pin_is_replaced_and_taken_back() -> None:
    model = phi3()
    before = rotate(model, 0, 1)
    assert depends_on_batch(rotary(model))
    assert pin_rotations(model, 200) is None
    assert not depends_on_batch(rotary(model))
    assert pin_rotations(model, ORIGINAL) == 200
    assert pin_rotations(model, None) == ORIGINAL
    assert depends_on_batch(rotary(model))
    assert all(torch.equal(*pair) for pair in zip(rotate(model, 0, 1), before, strict=True))


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_a_static_rotation_is_left_alone(kind: str) -> None:
    rope = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    }
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, rope_parameters=rope))
    assert not depends_on_batch(rotary(model))
    pin_rotations(model, 200)
    assert not rotary(model)._forward_hooks


def test_positions_may_come_by_name() -> None:
    model = phi3()
    pin_rotations(model, 200)
    by_name = rotary(model)(torch.empty(0), position_ids=torch.tensor([[5, 6]]))
    assert all(torch.equal(*pair) for pair in zip(by_name, rotate(model, 5, 6), strict=True))


def test_max_model_len_bounds_what_a_model_is_used_for() -> None:
    model = phi3()
    assert BaseModel("m", "m", model).max_position == 256
    assert BaseModel("m", "m", model, max_model_len=40).max_position == 40
    assert BaseModel("m", "m", model, max_model_len=4000).max_position == 256
