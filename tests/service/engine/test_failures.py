"""Failures of the model itself end the requests that cause them, while the others and the engine continue;
and the models that the engine refuses to serve."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from service.engine.wire.messages import SamplingParams
from tessera.errors import InvalidInput, UnsupportedModel
from tessera.model.base_model import BaseModel
from tests.service.engine.driver import Driver
from tests.service.engine.models import Served, family

Start = Callable[..., Driver]
BROKEN_TOKEN = 13


class FailingEmbedding(nn.Module):
    """An embedding that raises on one token, as a kernel would on unsupported input."""

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
def test_a_failing_step_costs_the_requests_that_make_it_fail_and_no_others(
    llama: Served, start: Start, error: Exception
) -> None:
    prompts = [[1, 2], [1, BROKEN_TOKEN], [3, 4], [5, 6]]
    driver = start(failing(llama, error))
    answers = [driver.submit(prompt) for prompt in prompts]
    driver.run()

    assert [answer.error_code for answer in answers] == [None, "step_failed", None, None]
    assert str(error) in (answers[1].last.error or ("", ""))[1]
    for index in (0, 2, 3):
        assert answers[index].token_ids == llama.oracle(None, prompts[index], 12)[0]
    stats = driver.engine.stats()
    assert (stats.step_failures_total, stats.kv_blocks_used) == (1, 0)


def refuse(module: nn.Module, is_bad: Callable[[Tensor], bool]) -> None:
    """Make `module` fail on bad inputs."""

    def check(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if is_bad(inputs[0]):
            raise RuntimeError("bad kernel")

    module.register_forward_pre_hook(check)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"enable_fused": False},
        {"decode_graphs": "static"},
        {"lookahead": "on"},
        {"lookahead": "on", "decode_graphs": "static", "max_batch_tokens": 16},
    ],
    ids=str,
)
def test_who_shares_a_failing_step_is_answered_as_ever(
    llama: Served, start: Start, config: dict[str, Any]
) -> None:
    """While four requests decode, two arrive with prompts that break the step, and one that draws by a
    seed."""
    base = BaseModel(llama.base.name, llama.base.model_id, copy.deepcopy(llama.pristine))
    served = Served(base, llama.basis, llama.other_basis, llama.adapters)
    seeded = SamplingParams(max_tokens=12, temperature=1.0, seed=5)
    refs, prompts = [*llama.refs[:3], None], llama.prompts(5, 23, 17, 38)
    alone = start(served, **config)
    expected = alone.submit(prompts[1], seeded, refs[1])
    alone.run()
    alone.engine.close()

    refuse(base.model.get_submodule("model.embed_tokens"), lambda ids: bool((ids == BROKEN_TOKEN).any()))
    driver = start(served, **config)
    answers = [driver.submit(prompt, adapter=ref) for ref, prompt in zip(refs, prompts, strict=True)]
    for _ in range(6):
        driver.fetch()
        driver.step()
    broken = [driver.submit([7, BROKEN_TOKEN, 8], adapter=ref) for ref in (None, refs[0])]
    drawn = driver.submit(prompts[1], seeded, refs[1])
    driver.run()

    assert [answer.error_code for answer in broken] == ["step_failed"] * 2
    assert drawn.token_ids == expected.token_ids
    for answer, ref, prompt in zip(answers, refs, prompts, strict=True):
        assert answer.token_ids == llama.oracle(ref, prompt, 12)[0]
    assert driver.engine.stats().kv_blocks_used == 0


def test_a_bad_module_costs_only_the_requests_with_an_adapter_on_it(llama: Served, start: Start) -> None:
    driver = start(llama, enable_fused=False)
    prompts = llama.prompts(5, 23, 17, 9)
    refs = [llama.other_refs[0], None, llama.refs[0], llama.other_refs[1]]
    answers = [driver.submit(prompt, adapter=ref) for ref, prompt in zip(refs, prompts, strict=True)]
    driver.fetch()
    slots = driver.engine.bases.tables[llama.other_basis.basis_id]
    layer = llama.base.model.get_submodule("model.layers.1.self_attn.v_proj")
    refuse(layer, lambda _: slots.active is not None and bool(slots.active.any()))
    try:
        driver.run()
    finally:
        layer._forward_pre_hooks.clear()

    assert [answer.error_code for answer in answers] == ["step_failed", None, None, "step_failed"]
    for index in (1, 2):
        assert answers[index].token_ids == llama.oracle(refs[index], prompts[index], 12)[0]


def test_a_step_that_fails_however_it_is_cut_fails_all_its_requests(llama: Served, start: Start) -> None:
    driver = start(failing(llama, RuntimeError("bad kernel")))
    answers = [driver.submit([BROKEN_TOKEN, index]) for index in range(5)]
    driver.run()
    assert [answer.error_code for answer in answers] == ["step_failed"] * 5
    stats = driver.engine.stats()
    assert (stats.step_failures_total, stats.kv_blocks_used) == (1, 0)


def test_what_fails_only_when_it_is_large_is_computed_in_parts(llama: Served, start: Start) -> None:
    """Simulate a memory that is too small for a whole step."""
    model = copy.deepcopy(llama.pristine)
    base = BaseModel(llama.base.name, llama.base.model_id, model)
    driver = start(Served(base, llama.basis, llama.other_basis, llama.adapters))
    refuse(model.get_submodule("model.embed_tokens"), lambda ids: ids.numel() > 30)
    prompts = llama.prompts(12, 14, 16, 18)
    answers = [driver.submit(prompt) for prompt in prompts]
    driver.run()
    assert [answer.token_ids for answer in answers] == [llama.oracle(None, p, 12)[0] for p in prompts]
    assert driver.engine.stats().step_failures_total == 1


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


#: A type of layer, and the message for the user.
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


def test_half_of_an_encoder_decoder_model_is_refused() -> None:
    config = BartConfig(vocab_size=17, d_model=8, decoder_layers=1, decoder_attention_heads=2)
    with pytest.raises(UnsupportedModel, match="decoder of an encoder-decoder model"):
        Engine(BaseModel("bart", "bart", BartForCausalLM(config).eval()), EngineConfig(num_blocks=4))


def test_a_model_without_a_cache_is_refused() -> None:
    config = OpenAIGPTConfig(vocab_size=17, n_embd=8, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModel, match="keeps no KV cache"):
        Engine(BaseModel("gpt", "gpt", OpenAIGPTLMHeadModel(config).eval()), EngineConfig(num_blocks=4))


def test_a_model_that_transformers_cannot_run_is_refused() -> None:
    served = failing(family("micro"), RuntimeError("shapes do not match"))
    served.base.model.model.embed_tokens.error_token = 0  # the call of the probe
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
    with pytest.raises(ValidationError, match=f"{next(iter(config))}\n  .* greater than or equal to [01] "):
        EngineConfig(**config)


def test_an_unknown_field_of_the_configuration_is_refused() -> None:
    with pytest.raises(ValidationError, match="num_slot\n  Extra inputs are not permitted"):
        EngineConfig(num_slot=4)


def test_memory_for_not_one_block_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no room for a KV block"):
        Engine(family("micro").base, EngineConfig(kv_cache_bytes=10))


def test_kv_memory_is_as_asked_for() -> None:
    engine = Engine(family("micro").base, EngineConfig(kv_cache_bytes=100_000))
    stats = engine.stats()
    engine.close()
    per_block = stats.memory_bytes["kv"] // (stats.kv_blocks + 1)
    assert stats.kv_blocks == 100_000 // per_block
