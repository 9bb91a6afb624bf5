"""A decoding batch without prefill: the engine is told that contexts are computed, and their KV is random."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.device_time import time_on_device
from service.engine.engine import Engine
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.formats.adapter_ref import AdapterRef

#: Steps that are discarded first, in which kernels are compiled and the graph is captured.
_WARM_UP = 5


@dataclass(frozen=True)
class StepTimes:
    """How long steps take, in seconds."""

    #: Each step, with scheduling, sampling and delivery.
    step_s: list[float]
    #: The computation alone, replayed without the host.
    device_s: list[float]
    #: The mean of a step that the host did not spend waiting for the device.
    host_s: float


def time_steps(
    engine: Engine, refs: Sequence[AdapterRef | None], *, context: int, num_steps: int
) -> StepTimes:
    """Decode one sequence of `context` tokens for each of `refs`, `num_steps` times."""
    start_batch(engine, refs, context=context, num_steps=num_steps + _WARM_UP + 2)
    for _ in range(_WARM_UP):
        engine.step()
    _synchronize()
    times, waited_s = [], engine.loop.wait_s
    for _ in range(num_steps):
        began = time.perf_counter()
        outputs = engine.step()
        times.append(time.perf_counter() - began)
        assert len(outputs) == len(refs), "not every sequence decoded in every step"
    host_s = (sum(times) - engine.loop.wait_s + waited_s) / num_steps
    return StepTimes(times, _end_batch(engine, len(refs)), host_s)


def time_mixed_steps(
    engine: Engine, refs: Sequence[AdapterRef | None], *, context: int, prompt_tokens: int, num_steps: int
) -> StepTimes:
    """As `time_steps`, with the prefill of another request of `prompt_tokens` in every step."""
    start_batch(engine, refs, context=context, num_steps=num_steps + _WARM_UP + 2)
    generator = torch.Generator().manual_seed(1)
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    times, waited_s = [], 0.0
    for index in range(_WARM_UP + num_steps):
        if index == _WARM_UP:
            _synchronize()
            waited_s = engine.loop.wait_s
        prompt = torch.randint(10, engine.info().vocab_size, (prompt_tokens,), generator=generator).tolist()
        began = time.perf_counter()
        engine.submit(GenerationRequest(f"prompt-{index}", "bench", prompt, sampling, refs[0]))
        engine.step()
        times.append(time.perf_counter() - began)
    times = times[_WARM_UP:]
    host_s = (sum(times) - engine.loop.wait_s + waited_s) / num_steps
    return StepTimes(times, _end_batch(engine, len(refs)), host_s)


def start_batch(engine: Engine, refs: Sequence[AdapterRef | None], *, context: int, num_steps: int) -> None:
    """Let sequences of `context` tokens run that have all but one of them computed."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = engine.info().vocab_size
    sampling = SamplingParams(max_tokens=num_steps, temperature=0.0)
    for index, ref in enumerate(refs):
        prompt = torch.randint(10, vocab_size, (context,), generator=generator).tolist()
        engine.submit(GenerationRequest(str(index), "bench", prompt, sampling, ref))
    while len(engine.scheduler.running) < len(refs):
        plan = engine.scheduler.schedule()
        assert plan.chunks, "not enough KV blocks for the batch"
        for sequence in engine.scheduler.running:
            sequence.num_computed = sequence.num_tokens - 1


def _end_batch(engine: Engine, count: int) -> list[float]:
    """Time the last step's computation alone, then let `count` sequences go."""
    _synchronize()
    device_s = _time_device(engine)
    for index in range(count):
        engine.cancel(str(index))
    while engine.has_work:
        engine.step()
    return device_s


def fill_kv(engine: Engine) -> None:
    """Random keys and values everywhere, as numbers like those that a model leaves."""
    generator = torch.Generator(engine.kv.pages_of(0)[0].device).manual_seed(0)
    for layer in range(len(engine.kv.shapes)):
        for pages in engine.kv.pages_of(layer):
            pages[1:].normal_(generator=generator)


def _time_device(engine: Engine) -> list[float]:
    """Seconds of the last step's computation; empty where it did not run over static buffers."""
    steps = engine.runner.static_steps
    if steps is None or not steps.can_repeat:
        return []
    if not torch.cuda.is_available():
        return time_on_device(steps.repeat, device=torch.device("cpu"), repeats=5)
    times = []
    for _ in range(10):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        steps.repeat()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
