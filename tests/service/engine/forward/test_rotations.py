"""Models with rotations that depend on the longest text of a batch are served and trained with a single
set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from service.engine.wire.messages import SamplingParams
from tessera.chat.chat_format import EncodedExample
from tessera.model.base_model import BaseModel, load_base_model
from tests.service.engine.driver import GREEDY, Driver
from trainer_worker.data.training_data import micro_batches
from trainer_worker.training.trainer import token_losses

ORIGINAL = 32
_SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.3, 2.0, 3.0, 5.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel
    if name == "phi3":
        phi3 = Phi3Config(**_SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=_LONGROPE)
        model = Phi3ForCausalLM(phi3)
    elif name == "phimoe":
        scales = {"short_mscale": 1.0, "long_mscale": 1.5}
        phimoe = PhimoeConfig(
            **_SIZES, num_local_experts=2, sliding_window=200, rope_parameters={**_LONGROPE, **scales}
        )
        model = PhimoeForCausalLM(phimoe)
    else:
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        model = LlamaForCausalLM(
            LlamaConfig(**{**_SIZES, "max_position_embeddings": 64}, rope_parameters=rope)
        )
    return model.eval().requires_grad_(False)


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(3, 211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("name", "enable_fused"),
    [("phi3", True), ("phi3", False), ("phimoe", False), ("dynamic", True), ("dynamic", False)],
)
def test_a_short_answer_does_not_depend_on_a_long_neighbour(name: str, enable_fused: bool) -> None:
    base = BaseModel(name, name, make(name))
    engine = Engine(base, EngineConfig(num_blocks=64, block_size=8, enable_fused=enable_fused))
    driver = Driver(engine)
    alone = driver.submit(prompt(9), GREEDY)
    driver.run()
    beside = [driver.submit(prompt(40, seed=2), GREEDY), driver.submit(prompt(9), GREEDY)][1]
    driver.run()
    again = driver.submit(prompt(9), GREEDY)
    driver.run()
    assert engine.runner.forward_mode.startswith("fused" if enable_fused else "generic")
    engine.close()
    for answer in (beside, again):
        assert answer.token_ids == alone.token_ids
        got, expected = ([report.logprob for report in a.logprobs] for a in (answer, alone))
        assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("enable_fused", [True, False], ids=["fused", "generic"])
@pytest.mark.parametrize(("max_model_len", "factors"), [(ORIGINAL, "short"), (None, "long")])
def test_training_turns_a_text_as_serving_does(
    tmp_path: Path, max_model_len: int | None, factors: str, enable_fused: bool
) -> None:
    """It also rotates as transformers does with these factors."""
    model = make("phi3")
    model.save_pretrained(tmp_path)
    base = load_base_model(tmp_path, device="cpu", max_model_len=max_model_len)
    ids = prompt(12)
    [batch] = micro_batches([(0, EncodedExample(ids, [False] + [True] * 11))], token_budget=64, min_tokens=0)
    trained = (-token_losses(base.model, batch)[0]).tolist()

    engine = Engine(base, EngineConfig(num_blocks=64, block_size=8, enable_fused=enable_fused))
    assert engine.info().max_model_len == (max_model_len or 256)
    driver = Driver(engine)
    answer = driver.submit(ids, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    driver.run()
    engine.close()
    reports = next(output.prompt_logprobs for output in answer.outputs if output.prompt_logprobs)
    assert [report.logprob for report in reports] == pytest.approx(trained, abs=1e-4)

    rope = {**_LONGROPE, "short_factor": _LONGROPE[f"{factors}_factor"]}
    plain = Phi3Config(**_SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=rope)
    reference = Phi3ForCausalLM(plain).eval()
    reference.load_state_dict(model.state_dict())
    logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert trained == pytest.approx(expected, abs=1e-4)
