"""The fused path: which models it takes, that its output is that of the merged model, and that it leaves no
trace."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.model.base_model import BaseModel
from tests.service.engine.driver import GREEDY, Driver
from tests.service.engine.models import FAMILIES, MORE_FAMILIES, Served, family, make_served, svd_basis
from tests.service.engine.test_exactness import assert_exact, cases, run

Start = Callable[..., Driver]


#: Without the bundled model, which every test of `test_exactness.py` runs fused.
@pytest.fixture(params=(*(name for name in FAMILIES if name != "tiny"), *MORE_FAMILIES))
def fusable(request: pytest.FixtureRequest) -> Served:
    return family(request.param)


def test_every_family_is_exact(fusable: Served, start: Start) -> None:
    """With prompts in pieces and preempted requests, then with prefixes from the cache."""
    all_cases = cases(fusable)
    driver = start(fusable, num_blocks=12, max_batch_tokens=16)

    assert driver.engine.info().forward_mode == "fused"
    assert_exact(fusable, all_cases, run(driver, all_cases))
    assert_exact(fusable, all_cases, run(driver, all_cases[:2]) + run(driver, all_cases[2:]))
    assert driver.engine.stats().preemptions_total > 0


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "olmo2"])
def test_other_bases_run_beside_the_fused_one(name: str, start: Start) -> None:
    fusable = family(name)
    short, long = fusable.prompts(6, 21)
    refs = [fusable.refs[0], fusable.other_refs[0], None, fusable.other_refs[1]]
    all_cases = [(ref, long) for ref in refs[:2]] + [(ref, short) for ref in refs[2:]]
    driver = start(fusable)

    assert_exact(fusable, all_cases, run(driver, all_cases))
    assert driver.engine.stats().resident_bases == 2


def test_a_default_basis_of_a_few_modules(llama: Served, start: Start) -> None:
    """Some layers have no target module, and some have only half."""
    base = BaseModel("few", "few", copy.deepcopy(llama.pristine))
    served = Served(base, svd_basis(base, 3, ("v_proj", "layers.1.mlp.up_proj")), llama.other_basis)
    generator = torch.Generator().manual_seed(5)
    basis = served.basis
    ref = AdapterRef("default", "few", 1, basis.basis_id)
    R = torch.randn(basis.num_modules, basis.rank, basis.rank, generator=generator)
    served.adapters[ref] = Adapter(basis.basis_id, R)
    all_cases = [(ref, served.prompts(19)[0]), (None, served.prompts(7)[0])]
    driver = start(served)

    assert driver.engine.info().forward_mode == "fused"
    assert_exact(served, all_cases, run(driver, all_cases))


def test_without_any_basis(llama: Served) -> None:
    prompt = llama.prompts(9)[0]
    engine = Engine(llama.base, EngineConfig(num_blocks=64, block_size=8))
    driver = Driver(engine)
    answer = driver.submit(prompt)
    driver.run()
    path = engine.info().forward_mode
    engine.close()

    assert path == "fused"
    assert_exact(llama, [(None, prompt)], [answer])


def test_a_basis_that_comes_after_the_first_step(llama: Served) -> None:
    ref, prompt = llama.refs[0], llama.prompts(9)[0]
    engine = Engine(llama.base, EngineConfig(num_blocks=64, block_size=8, num_slots=4))
    driver = Driver(engine, llama.adapters)
    first = driver.submit(prompt)
    driver.run()
    engine.add_basis(llama.basis)
    second = driver.submit(prompt, adapter=ref)
    driver.run()
    engine.close()

    assert_exact(llama, [(None, prompt), (ref, prompt)], [first, second])


@pytest.mark.parametrize("name", ["llama", "biased", "phi3"])
def test_weights_are_held_once_and_given_back(name: str, start: Start) -> None:
    fusable = family(name)
    model = fusable.base.model
    names = [name for name, _ in model.named_parameters()]
    driver = start(fusable)
    run(driver, cases(fusable)[:2])
    mlp = model.get_submodule("model.layers.0.mlp")
    storages = {part.untyped_storage().data_ptr() for part in mlp.parameters() if part.ndim == 2}
    driver.engine.close()

    assert len(storages) == 1  # of a layer
    after = dict(model.named_parameters())
    assert list(after) == names
    for name, expected in fusable.pristine.named_parameters():
        assert torch.equal(after[name], expected), name
        assert after[name].untyped_storage().nbytes() == after[name].nbytes, name


def test_a_nan_costs_its_user_and_nobody_else(llama: Served, start: Start) -> None:
    ref, prompt = llama.refs[1], llama.prompts(14)[0]
    driver = start(llama)
    broken = AdapterRef("default", "broken", 1, llama.basis.basis_id)
    driver.adapters[broken] = Adapter(broken.basis_id, torch.full_like(llama.adapters[ref].R, 1e38))
    bad = driver.submit(prompt, adapter=broken)
    good = [driver.submit(prompt, adapter=ref), driver.submit(prompt)]
    driver.run()

    assert bad.error_code == "non_finite_logits"
    assert_exact(llama, [(ref, prompt), (None, prompt)], good)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("starcoder2", "Starcoder2ForCausalLM is not among the fused architectures")],
)
def test_what_is_not_recognised_runs_unfused(name: str, reason: str, start: Start) -> None:
    served = family(name)
    all_cases = cases(served)
    driver = start(served)

    assert driver.engine.info().forward_mode == f"generic: {reason}"
    assert_exact(served, all_cases, run(driver, all_cases))


def test_an_odd_configuration_runs_unfused(llama: Served, start: Start) -> None:
    config = copy.deepcopy(llama.pristine.config)
    config.hidden_act = "relu"
    served = make_served(BaseModel("odd", "odd", type(llama.pristine)(config).eval().requires_grad_(False)))
    driver = start(served)

    assert "its activation is unknown" in driver.engine.info().forward_mode


def test_a_model_that_does_something_else_is_found_out(
    llama: Served, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """The modules and the configuration are as expected, but the model's own code does more, which the
    self-check shows."""
    base = BaseModel("odd", llama.base.model_id, copy.deepcopy(llama.pristine))
    head = base.model.lm_head
    base.model.model.norm.register_forward_hook(lambda module, args, output: 0.8 * output + 0.1)
    served = Served(base, llama.basis, llama.other_basis, llama.adapters)
    with caplog.at_level(logging.ERROR):
        driver = start(served)

    assert driver.engine.info().forward_mode.startswith("generic: its logits differ")
    assert "the fused path of LlamaForCausalLM is wrong" in caplog.text
    assert base.model.lm_head is head
    answer = run(driver, [(None, llama.prompts(5)[0])])[0]
    assert answer.finish_reason == "length"


class FlatRefusingEmbedding(nn.Embedding):
    """Accepts the input of the model itself, [1, T], and fails on anything else, as a kernel might."""

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.ndim != 2:
            raise RuntimeError("no kernel for this")
        return super().forward(input_ids)


def test_a_self_check_that_fails_leaves_the_generic_path(llama: Served, start: Start) -> None:
    base = BaseModel("odd", llama.base.model_id, copy.deepcopy(llama.pristine))
    own = base.model.model.embed_tokens
    odd = FlatRefusingEmbedding(own.num_embeddings, own.embedding_dim).requires_grad_(False)
    odd.weight.copy_(own.weight)
    base.model.model.embed_tokens = odd
    served = Served(base, llama.basis, llama.other_basis, llama.adapters)
    all_cases = cases(llama)
    driver = start(served)

    assert driver.engine.info().forward_mode.startswith("generic: its self-check failed")
    assert_exact(llama, all_cases, run(driver, all_cases))


def test_a_cache_of_two_tokens(llama: Served) -> None:
    """The cache has fewer tokens than the self-check at the start needs."""
    engine = Engine(llama.base, EngineConfig(num_blocks=2, block_size=1, decode_graphs="static"))
    engine.add_basis(llama.basis)
    driver = Driver(engine)
    answer = driver.submit([5], replace(GREEDY, max_tokens=1))
    driver.run()
    path = engine.info().forward_mode
    engine.close()

    assert path == "fused"
    assert answer.token_ids == llama.oracle(None, [5], 1)[0]


def test_switched_off(llama: Served, start: Start) -> None:
    assert start(llama, enable_fused=False).engine.info().forward_mode == "generic: it is switched off"
