"""What does the host do in a step of decoding, and how long does it take?

    python -m benchmarks.engine.host [--batch 1 32 256] [--context 256] [--prefix-cache] [--json FILE]

The model is one narrow layer, so that this runs anywhere. On a CPU the computation is timed alone and
subtracted; on CUDA it runs beside the host, so nothing is subtracted. Every sequence has an adapter of its
own, and steps look ahead. Figures are medians, in milliseconds per step:

    schedule    plan the next step
    launch      compute and upload its integers, and start the computation
    advance     treat the step as done, so that the next one can be planned
    collect     read the results of the step before; on CUDA this includes the wait, which is not in the sum
    deliver     add tokens to sequences and full blocks to the prefix cache, and deliver outputs
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.decode.random_models import random_adapter, random_basis
from benchmarks.decode.steps import start_batch
from benchmarks.device_time import time_on_device
from benchmarks.report import print_table, save
from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from tessera.formats.adapter_ref import AdapterRef
from tessera.model.base_model import BaseModel

Row = dict[str, Any]
#: Steps that are discarded first.
_WARM_UP = 5
#: Tokens by which a sequence may grow.
_ROOM = 512
_PARTS = ("schedule", "launch", "advance", "collect", "deliver")


def main() -> None:
    arguments = parse_arguments()
    assert arguments.steps <= _ROOM // 2, "sequences would outgrow their room"
    rows = [host_row(batch, arguments) for batch in arguments.batch]
    print_table(rows)
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments), rows=rows)


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prefix-cache", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


def host_row(batch: int, arguments: argparse.Namespace) -> Row:
    """Return the time of each part of a step of `batch` sequences, and their sum."""
    base = make_model(arguments.context + _ROOM)
    engine = make_engine(base, batch, arguments)
    refs = make_adapters(engine, base, batch)
    start_batch(engine, refs, context=arguments.context, num_steps=_ROOM - 1)
    times = time_parts(engine, num_steps=arguments.steps)
    steps = engine.runner.static_steps
    assert steps is not None, "the model is not run over static tensors"
    figures = {name: statistics.median(times[name]) for name in _PARTS}
    if torch.cuda.is_available():
        host_s = sum(figures.values()) - figures["collect"]
    else:
        computation = time_on_device(steps.repeat, device=torch.device("cpu"))
        figures["launch"] -= statistics.median(computation)
        host_s = sum(figures.values())
    engine.close()
    shown = {f"{name}_ms": round(seconds * 1e3, 3) for name, seconds in figures.items()}
    return {"batch": batch, "context": arguments.context, **shown, "host_ms": round(host_s * 1e3, 3)}


def make_model(length: int) -> BaseModel:
    """Make the random model, for sequences of up to `length` tokens."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=length,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return BaseModel("host", "random-host", model.to(device))


def make_engine(base: BaseModel, batch: int, arguments: argparse.Namespace) -> Engine:
    return Engine(
        base,
        EngineConfig(
            num_slots=batch,
            max_batch_seqs=batch,
            num_blocks=(batch + 1) * -(-base.max_position // 16),
            enable_prefix_cache=arguments.prefix_cache,
            decode_graphs="static",
            lookahead="on",
        ),
    )


def make_adapters(engine: Engine, base: BaseModel, count: int) -> list[AdapterRef]:
    """Give the engine `count` different adapters of one basis."""
    basis = random_basis(base, rank=4)
    engine.add_basis(basis)
    refs = [AdapterRef("bench", f"user-{index}", 1, basis.basis_id) for index in range(count)]
    for index, ref in enumerate(refs):
        engine.provide_adapter(ref, random_adapter(basis, index))
    return refs


def time_parts(engine: Engine, *, num_steps: int) -> dict[str, list[float]]:
    """Return the seconds of each part, per step."""
    times: defaultdict[str, list[float]] = defaultdict(list)

    def timed(run: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.perf_counter()
            result = run(*given)
            times[name].append(time.perf_counter() - began)
            return result

        return call

    scheduler, runner = engine.scheduler, engine.runner
    for owner, name in ((scheduler, "schedule"), (runner, "launch"), (scheduler, "advance")):
        setattr(owner, name, timed(getattr(owner, name), name))
    num_running = len(scheduler.running)
    for index in range(_WARM_UP + num_steps):
        if index == _WARM_UP:
            times.clear()
        began, waited_s = time.perf_counter(), engine.loop.wait_s
        outputs = engine.step()
        step_s = time.perf_counter() - began
        assert len(outputs) == num_running or index == 0, "not every sequence decoded in every step"
        times["collect"].append(engine.loop.wait_s - waited_s)
        others = (times[name][-1] for name in ("schedule", "launch", "advance", "collect"))
        times["deliver"].append(step_s - sum(others))
    return times


if __name__ == "__main__":
    main()
