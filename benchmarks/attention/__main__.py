"""Paged attention: share of copy bandwidth in decode, FLOP/s in prefill, the launch shapes behind both."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.peers import peers
from benchmarks.attention.tune import tune
from benchmarks.attention.workload import Heads, Layers, Workload
from benchmarks.device_time import copy_bandwidth, time_on_device
from benchmarks.report import percentiles, print_table, save
from service.engine.attention.paged import TritonPagedAttention, queries_per_tile

#: (batch, context) of decode, and (batch, context, queries) of prefill: whole prompts, a chunk of a long one,
#: and the short follow-ups of a conversation.
DECODE = [(batch, context) for batch in (1, 32, 256) for context in (256, 1024, 4096, 8192)]
PREFILL = [(1, 512, 512), (4, 2048, 2048), (1, 8192, 8192), (1, 8192, 512), (16, 2048, 32)]
SMALL_DECODE, SMALL_PREFILL = [(2, 64), (8, 128)], [(1, 96, 96), (2, 96, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--tune", action="store_true", help="find the fastest launch shapes (CUDA only)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        bandwidth = copy_bandwidth(device)
        print(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s")
        rows = (tune_rows if arguments.tune else all_rows)(arguments, device, bandwidth)
    print_table(rows)
    facts = {**vars(arguments), "copy_bytes_per_s": bandwidth}
    save(arguments.json, question=__doc__.splitlines()[0], arguments=facts, rows=rows)


def all_rows(arguments: argparse.Namespace, device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    is_small = device.type != "cuda"
    cases = [(batch, context, 1) for batch, context in (SMALL_DECODE if is_small else DECODE)]
    cases += SMALL_PREFILL if is_small else PREFILL
    rows = []
    for batch, context, queries in cases:
        workload = make_workload(arguments, device, batch, context, queries)
        with_peers = () if arguments.without_peers else peers(workload)
        for name, run in itertools.chain(ours(workload), with_peers):
            try:
                times = time_on_device(run, device=device, repeats=arguments.repeats)
            except RuntimeError as error:  # a peer that cannot do this one, or has no memory for it
                rows.append({**describe(workload), "what": name, "note": str(error).splitlines()[0][:80]})
                continue
            rows.append(make_row(workload, name, times, bandwidth))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def tune_rows(arguments: argparse.Namespace, device: torch.device, _bandwidth: float) -> list[dict[str, Any]]:
    if device.type != "cuda":
        raise SystemExit("--tune needs a CUDA device")

    def workload(batch: int, context: int, queries: int) -> Workload:
        return make_workload(arguments, device, batch, context, queries)

    return tune(workload)


def make_workload(
    arguments: argparse.Namespace, device: torch.device, batch: int, context: int, queries: int
) -> Workload:
    heads = Heads(arguments.heads, arguments.kv_heads, arguments.head_dim)
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, arguments.dtype)
    return Workload(heads, batch, context, queries, dtype, device, arguments.block_size)


def ours(workload: Workload) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name, and a run over all layers, each checked before it is timed."""
    layers = Layers(workload)
    if workload.device.type != "cuda":
        yield "torch, paged", partial(layers.attend, layers.torch_step())
        return
    per_tile = queries_per_tile(layers.kv, workload.heads.num_heads)
    for name, can_split in (("triton", None), ("triton, whole", False), ("triton, split", True)):
        step = layers.triton_step(queries_per_tile=per_tile, can_split=can_split)
        layers.check(layers.attend(step), rows=sorted({0, workload.batch // 2, workload.batch - 1}))
        yield name, partial(attend_anew, layers, step)


def attend_anew(layers: Layers, step: TritonPagedAttention) -> Tensor:
    """A step as it is served: its work is cut once, then all layers attend."""
    step.begin()
    return layers.attend(step)


def make_row(workload: Workload, name: str, times: list[float], bandwidth: float) -> dict[str, Any]:
    """One layer's share of the median run."""
    layer_s = statistics.median(times) / workload.num_layers
    row = {**describe(workload), "what": name, "layers": workload.num_layers}
    row["us_per_layer"] = round(layer_s * 1e6, 1)
    if workload.queries == 1:
        row["of_copy_bandwidth"] = round(workload.kv_bytes / layer_s / bandwidth, 3)
    else:
        row["tflops"] = round(workload.flops / layer_s / 1e12, 1)
    return {**row, **percentiles(times)}


def describe(workload: Workload) -> dict[str, Any]:
    phase = "decode" if workload.queries == 1 else "prefill"
    return {"phase": phase, "batch": workload.batch, "context": workload.context, "queries": workload.queries}


if __name__ == "__main__":
    main()
