"""When the model itself fails: the requests of that step end, the engine goes on. And what it refuses to
serve."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from adapter_core.base_model import BaseModel
from adapter_core.errors import InvalidInput, UnsupportedModel
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from tests.engine.driver import Driver
from tests.engine.models import Served, family

Start = Callable[..., Driver]
BROKEN_TOKEN = 13


class FailingEmbedding(nn.Module):
    """An embedding that raises on one token, as a kernel would on input that it cannot take."""

    def __init__(self, embedding: nn.Module, error: Exception) -> None:
        super().__init__()
        self.embedding = embedding
        self.error = error
        self.error_token = BROKEN_TOKEN

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        if bool((input_ids == self.error_token).any()):
            raise self.error
        embedded: Tensor = self.embedding(input_ids)
        return embedded


def failing(served: Served, error: Exception) -> Served:
    model = copy.deepcopy(served.pristine)
    model.model.embed_tokens = FailingEmbedding(model.model.embed_tokens, error)
    base = BaseModel(served.base.name, served.base.model_id, model)
    return Served(base, served.basis, served.other_basis, served.adapters)


@pytest.mark.parametrize("error", [RuntimeError("bad kernel"), torch.OutOfMemoryError("full")], ids=repr)
def test_a_failing_step_costs_its_requests_and_no_others(
    llama: Served, start: Start, error: Exception
) -> None:
    driver = start(failing(llama, error), max_batch_seqs=2)
    answers = [driver.submit(prompt) for prompt in ([1, 2], [1, BROKEN_TOKEN], [3, 4], [5, 6])]
    driver.run()

    assert [answer.error_code for answer in answers] == ["step_failed", "step_failed", None, None]
    assert str(error) in (answers[0].last.error or ("", ""))[1]
    assert [answer.token_ids for answer in answers[2:]] == [
        llama.oracle(None, prompt, 12)[0] for prompt in ([3, 4], [5, 6])
    ]
    stats = driver.engine.stats()
    assert (stats.step_failures_total, stats.kv_blocks_used) == (1, 0)


def test_a_failure_in_a_later_chunk_frees_what_the_first_took(llama: Served, start: Start) -> None:
    driver = start(failing(llama, RuntimeError("bad kernel")), max_batch_tokens=8)
    answer = driver.submit([1] * 20 + [BROKEN_TOKEN], adapter=llama.refs[0])
    driver.run()
    assert answer.error_code == "step_failed"
    assert (driver.engine.stats().kv_blocks_used, driver.engine.stats().slots_pinned) == (0, 0)


def test_an_accelerators_error_ends_the_engine_after_failing_the_step(llama: Served, start: Start) -> None:
    driver = start(failing(llama, torch.AcceleratorError("illegal memory access")))
    driver.submit([BROKEN_TOKEN])
    with pytest.raises(torch.AcceleratorError):
        driver.engine.step()
    driver.engine.check_integrity()


def test_a_closed_engine_gives_the_model_back(llama: Served) -> None:
    before = {name: type(module) for name, module in llama.base.model.named_modules()}
    engine = Engine(llama.base, EngineConfig(num_blocks=8))
    engine.add_basis(llama.basis)
    engine.close()
    assert {name: type(module) for name, module in llama.base.model.named_modules()} == before
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(llama.base.model(ids).logits, llama.pristine(ids).logits)


#: A type of layer, and what a user is told about it.
LAYER_REASONS = {
    "linear_attention": "keeps a recurrent state",
    "hybrid": "keeps a recurrent state",
    "indexed_attention": "sparse attention chooses tokens",
    "compressed_sparse_attention": "summaries of earlier tokens",
}


@pytest.mark.parametrize("layer_type", LAYER_REASONS)
def test_layers_that_keep_more_than_keys_and_values_are_refused(layer_type: str) -> None:
    model = copy.deepcopy(family("micro").pristine)
    model.config.layer_types = [layer_type]
    with pytest.raises(UnsupportedModel, match=LAYER_REASONS[layer_type]):
        Engine(BaseModel("odd", "odd", model), EngineConfig(num_blocks=4))


def test_a_recurrent_model_is_refused() -> None:
    config = RwkvConfig(vocab_size=17, hidden_size=8, num_hidden_layers=2)
    with pytest.raises(UnsupportedModel, match=r"RwkvForCausalLM .* keeps a recurrent state"):
        Engine(BaseModel("rwkv", "rwkv", RwkvForCausalLM(config).eval()), EngineConfig(num_blocks=4))


def test_a_model_without_a_cache_is_refused() -> None:
    config = OpenAIGPTConfig(vocab_size=17, n_embd=8, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModel, match="keeps no KV cache"):
        Engine(BaseModel("gpt", "gpt", OpenAIGPTLMHeadModel(config).eval()), EngineConfig(num_blocks=4))


def test_a_model_that_transformers_cannot_run_is_refused() -> None:
    served = failing(family("micro"), RuntimeError("shapes do not match"))
    served.base.model.model.embed_tokens.error_token = 0  # the one of the trial run
    with pytest.raises(UnsupportedModel, match="cannot run it on one token: RuntimeError: shapes do not"):
        Engine(served.base, EngineConfig(num_blocks=4))


def test_a_device_that_runs_out_of_memory_says_nothing_about_the_model() -> None:
    served = failing(family("micro"), torch.OutOfMemoryError("full"))
    served.base.model.model.embed_tokens.error_token = 0
    with pytest.raises(torch.OutOfMemoryError):
        Engine(served.base, EngineConfig(num_blocks=4))


def test_the_kernels_cannot_be_demanded_for_a_model_that_attends_itself() -> None:
    config = BloomConfig(n_layer=1, n_head=2, hidden_size=8, vocab_size=17)
    base = BaseModel("bloom", "bloom", BloomForCausalLM(config).eval())
    with pytest.raises(UnsupportedModel, match="the model computes attention itself"):
        Engine(base, EngineConfig(num_blocks=4, attention="triton"))


@pytest.mark.parametrize("config", [{"num_slots": 0}, {"block_size": 0}, {"host_cache_bytes": -1}], ids=str)
def test_a_configuration_out_of_range_is_refused(config: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="must be at least"):
        EngineConfig(**config)


def test_memory_for_not_one_block_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no room for a KV block"):
        Engine(family("micro").base, EngineConfig(kv_cache_bytes=10))


def test_kv_memory_is_as_asked_for() -> None:
    engine = Engine(family("micro").base, EngineConfig(kv_cache_bytes=100_000))
    stats = engine.stats()
    engine.close()
    per_block = stats.memory_bytes["kv"] // (stats.kv_blocks + 1)
    assert stats.kv_blocks == 100_000 // per_block
