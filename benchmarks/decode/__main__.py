"""What do adapters cost while decoding? Steps of a whole model, bare and with 1 to 256 different adapters.

    python -m benchmarks.decode [--geometry 8b] [--batch 1 32 256] [--context 1024] [--rank 16] [--json FILE]

Random weights of published geometry (8b, 1b; small for a CPU), contexts that are taken for computed over
random KV. A step is the engine's own: scheduling, computation, sampling, delivery. The roofline is the time
that the weights and the batch's KV take at the measured bandwidth of a copy. Ratios are within this run;
the peers are transformers' own forward pass over a dense cache and, with --continuous-batching, its
continuous batching.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode.kernels import kernel_times
from benchmarks.decode.peers import time_continuous_batching, time_forward
from benchmarks.decode.random_models import GEOMETRIES, random_adapter, random_basis, random_model
from benchmarks.decode.steps import StepTimes, fill_kv, time_mixed_steps, time_steps
from benchmarks.device_time import copy_bandwidth
from benchmarks.report import percentiles, print_table, save
from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.model.base_model import DTYPES, BaseModel

Row = dict[str, Any]
#: Tokens that a sequence may grow by while it is measured.
_ROOM = 128
#: Beside the batch: the request whose prompt a mixed step computes, and the one before it.
_MIXED_SEQS = 2
#: Of the requests that are compared with continuous batching.
_CB_PROMPT, _CB_NEW = 64, 64
_BATCHING = "transformers, continuous batching"


def main() -> None:
    arguments = parse_arguments()
    assert arguments.steps <= _ROOM // 2, "sequences would outgrow their room"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        bandwidth = copy_bandwidth(device)
    base = random_model(
        arguments.geometry,
        device=device,
        dtype=DTYPES[arguments.dtype],
        max_position=max(arguments.context) + _ROOM,
    )
    rows = list(engine_rows(base, arguments, bandwidth))
    if not arguments.without_peers:
        rows += peer_rows(base, arguments)
    add_ratios(rows)
    print_table(rows)
    facts = {**vars(arguments), "copy_bytes_per_s": bandwidth}
    save(arguments.json, question=__doc__.splitlines()[0], arguments=facts, rows=rows)


def parse_arguments() -> argparse.Namespace:
    has_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="8b" if has_cuda else "small")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if has_cuda else "float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256] if has_cuda else [1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[1024] if has_cuda else [64])
    parser.add_argument("--distinct", type=int, nargs="+", default=[1, 8, 256] if has_cuda else [1, 8])
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--steps", type=int, default=50 if has_cuda else 5)
    parser.add_argument("--decode-graphs", default="auto")
    parser.add_argument("--lookahead", default="auto")
    parser.add_argument(
        "--mixed", type=int, nargs="*", default=[], help="also with prompts of so many tokens"
    )
    parser.add_argument("--kernels", action="store_true", help="also where a step's time goes (CUDA only)")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--continuous-batching", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def engine_rows(base: BaseModel, arguments: argparse.Namespace, bandwidth: float) -> Iterator[Row]:
    """The bare model, then every rank with every number of adapters."""
    for rank in (0, *arguments.rank):
        engine = make_engine(base, arguments)
        basis = random_basis(base, rank) if rank else None
        refs = [] if basis is None else add_adapters(engine, basis, max(arguments.distinct))
        fill_kv(engine)
        for batch in arguments.batch:
            for context in arguments.context:
                if batch * -(-(context + _ROOM) // engine.pool.block_size) > engine.pool.num_blocks:
                    continue  # not enough memory on this device
                for distinct in sorted({min(n, batch) for n in arguments.distinct}) if rank else (0,):
                    chosen = [refs[i % distinct] if distinct else None for i in range(batch)]
                    times = time_steps(engine, chosen, context=context, num_steps=arguments.steps)
                    roofline_s = step_bytes(base, batch, context) / bandwidth
                    case = {"batch": batch, "context": context, "rank": rank, "adapters": distinct}
                    yield {"what": "engine", **case, **figures(times, batch, roofline_s)}
                    if arguments.kernels and engine.runner.static_steps is not None:
                        for row in kernel_times(engine.runner.static_steps.repeat):
                            yield {"what": "kernel", **case, **row}
                    for prompt_tokens in arguments.mixed:
                        yield mixed_row(engine, chosen, case, prompt_tokens, arguments.steps)
        if not rank and arguments.continuous_batching:
            yield from request_rows(engine, arguments)
        engine.close()
        del engine
        release()


def mixed_row(
    engine: Engine, refs: list[AdapterRef | None], case: Row, prompt_tokens: int, num_steps: int
) -> Row:
    """A batch that decodes while one prompt after the other is computed beside it."""
    times = time_mixed_steps(
        engine, refs, context=case["context"], prompt_tokens=prompt_tokens, num_steps=num_steps
    )
    tokens_per_s = round((len(refs) + prompt_tokens) / statistics.mean(times.step_s), 1)
    row = {"what": "engine, mixed", **case, "prompt": prompt_tokens, "tokens_per_s": tokens_per_s}
    device_ms = round(statistics.median(times.device_s) * 1e3, 3) if times.device_s else None
    return {
        **row,
        **percentiles(times.step_s),
        "device_ms": device_ms,
        "host_ms": round(times.host_s * 1e3, 3),
    }


def make_engine(base: BaseModel, arguments: argparse.Namespace) -> Engine:
    batch, context = max(arguments.batch), max(arguments.context)
    config = EngineConfig(
        num_slots=max(arguments.distinct),
        max_batch_seqs=batch + _MIXED_SEQS,
        max_batch_tokens=max(batch + max(arguments.mixed, default=0), 2048),
        num_blocks=None if torch.cuda.is_available() else (batch + 1) * -(-(context + _ROOM) // 16),
        enable_prefix_cache=False,
        host_cache_bytes=8 * 1024**3,  # every adapter of the run, at any rank
        decode_graphs=arguments.decode_graphs,
        lookahead=arguments.lookahead,
    )
    return Engine(dataclasses.replace(base, max_model_len=context + _ROOM), config)


def add_adapters(engine: Engine, basis: Basis, count: int) -> list[AdapterRef]:
    engine.add_basis(basis)
    assert engine.info().forward_mode == "fused", engine.info().forward_mode
    refs = [AdapterRef("bench", f"user-{index}", 1, basis.basis_id) for index in range(count)]
    for index, ref in enumerate(refs):
        engine.provide_adapter(ref, random_adapter(basis, index))
    return refs


def step_bytes(base: BaseModel, batch: int, context: int) -> int:
    """What a step of the bare model must read: every weight but the embedding's, and the KV of the batch."""
    model = base.model
    embedding = model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters()) - embedding.nbytes
    if model.get_output_embeddings().weight is embedding:
        weights += embedding.nbytes
    config = model.config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(weights + batch * context * kv * embedding.dtype.itemsize)


def figures(times: StepTimes, batch: int, roofline_s: float) -> Row:
    """device_ms: the computation alone. host_ms: what the host does in a step, on CUDA beside it."""
    p50 = statistics.median(times.step_s)
    device_s = statistics.median(times.device_s) if times.device_s else None
    return {
        "tokens_per_s": round(batch / statistics.mean(times.step_s), 1),
        **percentiles(times.step_s),
        "device_ms": None if device_s is None else round(device_s * 1e3, 3),
        "host_ms": round(times.host_s * 1e3, 3),
        "of_roofline": round(roofline_s / p50, 3),
        "device_of_roofline": None if device_s is None else round(roofline_s / device_s, 3),
    }


def request_rows(engine: Engine, arguments: argparse.Namespace) -> Iterator[Row]:
    """Whole requests by our engine, beside which `generate_batch` is put."""
    for batch in arguments.batch:
        sampling = SamplingParams(max_tokens=_CB_NEW, temperature=0.0)
        prompts = make_prompts(batch, engine.info().vocab_size)
        seconds = 0.0
        for _ in range(2):
            seconds = time_requests(engine, prompts, sampling)
        yield {
            "what": "engine, requests",
            "batch": batch,
            "tokens_per_s": round(batch * _CB_NEW / seconds, 1),
        }


def time_requests(engine: Engine, prompts: list[list[int]], sampling: SamplingParams) -> float:
    began = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(str(index), "bench", prompt, sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
    return time.perf_counter() - began


def make_prompts(batch: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(
        10, vocab_size, (batch, _CB_PROMPT), generator=generator
    ).tolist()
    return prompts


def peer_rows(base: BaseModel, arguments: argparse.Namespace) -> Iterator[Row]:
    base.model.set_attn_implementation("sdpa")
    for batch in arguments.batch:
        for context in arguments.context:
            try:
                times = time_forward(base.model, batch=batch, context=context, repeats=5)
            except torch.OutOfMemoryError:
                continue
            finally:
                release()
            case = {"what": "transformers forward", "batch": batch, "context": context}
            tokens_per_s = round(batch / statistics.mean(times), 1)
            yield {**case, "tokens_per_s": tokens_per_s, **percentiles(times)}
        if arguments.continuous_batching:
            yield {"what": _BATCHING, "batch": batch, **continuous_batching(base, batch)}


def continuous_batching(base: BaseModel, batch: int) -> Row:
    prompts = make_prompts(batch, base.model.config.vocab_size)
    try:
        seconds = time_continuous_batching(base.model, prompts, new_tokens=_CB_NEW)
    except Exception as error:  # theirs, and no reason to lose our rows
        return {"error": repr(error)}
    return {"tokens_per_s": round(batch * _CB_NEW / seconds, 1)}


def add_ratios(rows: list[Row]) -> None:
    """ratio_to_bare: of the step time of the bare model to this one; ratio_to_transformers: of tokens/s to
    those of the same case."""
    bare = {case_of(row): row for row in rows if row["what"] == "engine" and not row["rank"]}
    peers = {case_of(row): row for row in rows if row["what"] == "transformers forward"}
    batching = {row["batch"]: row for row in rows if row["what"] == _BATCHING and "tokens_per_s" in row}
    for row in rows:
        if row["what"] == "engine":
            row["ratio_to_bare"] = round(bare[case_of(row)]["p50_ms"] / row["p50_ms"], 3)
            if row["device_ms"]:
                row["device_ratio_to_bare"] = round(bare[case_of(row)]["device_ms"] / row["device_ms"], 3)
            if case_of(row) in peers:
                ratio = row["tokens_per_s"] / peers[case_of(row)]["tokens_per_s"]
                row["ratio_to_transformers"] = round(ratio, 2)
        if row["what"] == "engine, requests" and row["batch"] in batching:
            ratio = row["tokens_per_s"] / batching[row["batch"]]["tokens_per_s"]
            row["ratio_to_transformers"] = round(ratio, 2)


def case_of(row: Row) -> tuple[int, int]:
    return row["batch"], row["context"]


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
