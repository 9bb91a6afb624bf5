"""The same exactness on a CUDA device. Skipped without one; run this on one before a release."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from service.engine.adapters.packed_adapter import PackedAdapter
from service.engine.adapters.slots import SlotTable
from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from service.engine.wire.messages import SamplingParams
from tessera.formats.adapter_ref import AdapterRef
from tessera.model.base_model import BaseModel
from tests.service.engine.driver import Driver
from tests.service.engine.models import FAMILIES, MORE_FAMILIES, Served, family
from tests.service.engine.test_exactness import assert_exact, cases, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=(*FAMILIES, *MORE_FAMILIES))
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Models on the device, without TF32, because the oracle's float32 must be exact."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield family(request.param, "cuda")
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_batch_tokens": 5},
        {"num_blocks": 10, "max_batch_tokens": 16},
        {"decode_graphs": "off", "lookahead": "off"},
        {"enable_fused": False},
        {"attention": "torch"},
    ],
    ids=["together", "chunked", "preempted", "step by step", "generic", "torch attention"],
)
def test_exactness_on_cuda(served: Served, start: Callable[..., Driver], config: dict[str, Any]) -> None:
    all_cases = cases(served)
    driver = start(served, **config)

    assert_exact(served, all_cases, run(driver, all_cases))
    if "num_blocks" not in config:
        assert_exact(served, all_cases, run(driver, all_cases))  # this time from the prefix cache
    if config.get("enable_fused", True):
        assert driver.engine.info().forward_mode == "fused"
    steps = driver.engine.runner.static_steps
    captured = [] if steps is None else steps.captured
    has_graphs = not config.keys() & {"decode_graphs", "enable_fused", "attention"}
    assert {shape.is_mixed for shape in captured} == ({True, False} if has_graphs else set())


@pytest.mark.parametrize(
    "config",
    [{}, {"max_batch_tokens": 7}, {"num_blocks": 10, "max_batch_tokens": 16}],
    ids=["together", "chunked", "preempted"],
)
def test_replayed_steps_with_prompts_in_them_are_exact(
    served: Served, start: Callable[..., Driver], config: dict[str, Any]
) -> None:
    """Repeat the same traffic until a round needs no new graph."""
    all_cases = cases(served)
    driver = start(served, enable_prefix_cache=False, **config)
    steps = driver.engine.runner.static_steps
    assert steps is not None
    for _ in range(3):
        before, num_replays, num_steps = steps.captured, steps.num_replays, driver.engine.loop.num_steps
        assert_exact(served, all_cases, run(driver, all_cases))
    assert steps.captured == before
    assert any(shape.is_mixed for shape in before)
    assert steps.num_replays - num_replays == driver.engine.loop.num_steps - num_steps


def test_graphs_captured_at_start(start: Callable[..., Driver]) -> None:
    """No request causes a capture, and replayed steps are exact."""
    served = family("llama", "cuda")
    driver = start(served, max_batch_tokens=100)
    driver.engine.runner.warm_up()
    steps = driver.engine.runner.static_steps
    assert steps is not None
    captured = steps.captured
    assert {shape.num_rows for shape in captured if shape.is_mixed} == {16, 32, 64, 96, 100}
    assert not any(page.any() for layer in range(3) for page in driver.engine.kv.pages_of(layer))

    all_cases = cases(served)
    assert_exact(served, all_cases, run(driver, all_cases))
    assert steps.captured == captured
    assert steps.num_replays == driver.engine.loop.num_steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "olmo2"])
def test_half_precision_is_fused_too(name: str, dtype: torch.dtype, start: Callable[..., Driver]) -> None:
    """The self-check at the start of the engine compares both paths. Graphs and plain steps must agree
    then."""
    served = family(name)
    base = BaseModel(name, served.base.model_id, copy.deepcopy(served.pristine).to("cuda", dtype))
    half = Served(base, served.basis, served.other_basis, served.adapters)
    tokens = []
    for config in ({}, {"decode_graphs": "off", "lookahead": "off"}):
        driver = start(half, **config)
        assert driver.engine.info().forward_mode == "fused"
        tokens.append([answer.token_ids for answer in run(driver, cases(half))])
        driver.engine.close()
    same = sum(a[:4] == b[:4] for a, b in zip(*tokens, strict=True))
    assert same >= 4, tokens  # a near tie may fall either way


def test_a_graph_draws_what_plain_steps_draw(start: Callable[..., Driver]) -> None:
    served = family("llama", "cuda")
    sampling = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=3)
    tokens = []
    for config in ({}, {"decode_graphs": "off", "lookahead": "off"}):
        driver = start(served, enable_prefix_cache=False, **config)
        for _ in range(2):  # the second time all steps are replayed
            answers = [driver.submit(prompt, sampling, served.refs[0]) for prompt in served.prompts(5, 9, 14)]
            driver.run()
        driver.engine.close()
        tokens.append([answer.token_ids for answer in answers])
    assert tokens[0] == tokens[1]


def test_weights_are_not_held_twice(start: Callable[..., Driver]) -> None:
    """With wide layers, fusing adds only the factors to the memory in use."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=100)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    before = torch.cuda.memory_allocated()
    engine = Engine(BaseModel("wide", "wide", model, max_model_len=64), EngineConfig(num_blocks=8))
    driver = Driver(engine)
    driver.submit([1, 2, 3])
    driver.run()
    held = torch.cuda.memory_allocated() - before - engine.kv.nbytes
    engine.close()
    assert engine.runner.static_steps is None
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert held < 0.2 * weights, (held, weights)


def test_memory_by_kind_adds_up_to_the_device(start: Callable[..., Driver]) -> None:
    served = family("tiny", "cuda")
    driver = start(served)
    run(driver, cases(served))

    memory = driver.engine.stats().memory_bytes

    free, total = torch.cuda.mem_get_info()
    assert sum(memory.values()) == pytest.approx(total, rel=0.01), memory
    assert memory["free"] == pytest.approx(free, rel=0.01)


def test_a_slot_is_loaded_after_the_self_check_has_left_it() -> None:
    """The self-check writes to a slot on the stream of the steps, and loads have a stream of their own."""
    table = SlotTable((2, 4), num_slots=1, max_tokens=1, device=torch.device("cuda"), dtype=torch.float32)
    R = torch.ones(2, 4, 4)
    slot = table.begin_self_check(2 * R)
    torch.cuda._sleep(200_000_000)  # about 0.1 s, during which the zeroing at the end of the self-check waits
    table.end_self_check()

    assert table.pin(AdapterRef("t", "a", 1, "b"), PackedAdapter("b", R.pin_memory())) == slot
    table.stage(torch.tensor([slot], device="cuda"))

    torch.cuda.synchronize()
    assert torch.equal(table.R_slots[slot].cpu(), R)
