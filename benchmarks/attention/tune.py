"""The fastest launch shapes on this device, found in two rounds, as rows to paste into `CONFIGS`.

First the shape of a program (keys at a time, warps, stages), with contexts whole; then, for the best few, how
finely contexts are split, where batches are too small to fill the device.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import astuple
from typing import Any

import torch

from benchmarks.attention.workload import Layers, Workload
from benchmarks.device_time import time_on_device
from service.engine.attention.paged import device_limits
from service.engine.kernels.paged_configs import KernelConfig, Phase, padded_dim

MakeWorkload = Callable[[int, int, int], Workload]

#: (batch, context, queries) of each round, chosen to fill the device in the first and not to in the second.
_WHOLE = {
    Phase.DECODE: [(256, 256, 1), (256, 1024, 1), (128, 4096, 1)],
    Phase.PREFILL: [(4, 2048, 2048), (8, 1024, 512)],
}
_SPLIT = {
    Phase.DECODE: [(1, 1024, 1), (1, 8192, 1), (8, 1024, 1), (32, 1024, 1), (32, 4096, 1)],
    Phase.PREFILL: [(1, 512, 512), (1, 8192, 64), (16, 2048, 32)],
}
_SHAPES = {
    Phase.DECODE: [*itertools.product((16,), (32, 64, 128), (2, 4, 8), (3, 5, 7))],  # 4 is laid out like 3
    Phase.PREFILL: [*itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))],
}
_PROGRAMS_PER_SM = (1, 2, 3, 4, 6, 8)
_PART_TOKENS = (64, 128, 256, 512)
_NUM_KEPT = 3
_REPEATS = 10


def tune(make_workload: MakeWorkload) -> list[dict[str, Any]]:
    """Rows of all that was measured, the best of each phase last; prints the table."""
    rows = []
    for phase in Phase:
        shapes = [KernelConfig(*shape, 1, shape[1]) for shape in _fitting(phase, make_workload(1, 64, 1))]
        first = _measure(phase, shapes, _WHOLE[phase], make_workload, can_split=False)
        kept = sorted(first, key=lambda row: row["score_us"])[:_NUM_KEPT]
        splits = [
            KernelConfig(c.block_m, c.block_n, c.num_warps, c.num_stages, programs, part)
            for c in (row["config"] for row in kept)
            for programs, part in itertools.product(_PROGRAMS_PER_SM, _PART_TOKENS)
            if part % c.block_n == 0
        ]
        second = _measure(phase, splits, _SPLIT[phase], make_workload, can_split=True)
        best = min(second, key=lambda row: row["score_us"])
        rows += [*first, *second, {**best, "best": True}]
        _print_best(phase, best["config"], make_workload(1, 64, 1))
    return rows


def _fitting(phase: Phase, workload: Workload) -> Iterable[tuple[int, int, int, int]]:
    limit = device_limits(workload.device).shared_bytes or math.inf
    dim = padded_dim(workload.heads.dim)
    for shape in _SHAPES[phase]:
        if KernelConfig(*shape, 1, shape[1]).shared_bytes(dim, dim, workload.dtype.itemsize) <= limit:
            yield shape


def _measure(
    phase: Phase,
    configs: list[KernelConfig],
    cases: list[tuple[int, int, int]],
    make_workload: MakeWorkload,
    *,
    can_split: bool,
) -> list[dict[str, Any]]:
    """One row per shape: microseconds a layer for each case, and their geometric mean as `score_us`."""
    rows: list[dict[str, Any]] = [{"phase": str(phase), "config": config, "us": {}} for config in configs]
    for case in cases:
        layers = Layers(make_workload(*case))
        for row in rows:
            row["us"][str(case)] = _time(layers, phase, row["config"], can_split)
        del layers
        torch.cuda.empty_cache()
    for row in rows:
        row["score_us"] = round(math.exp(statistics.mean(math.log(us) for us in row["us"].values())), 2)
    return rows


def _time(layers: Layers, phase: Phase, config: KernelConfig, can_split: bool) -> float:
    """Microseconds a layer, infinite for a shape that this device cannot run."""
    w = layers.workload
    per_tile = max(1, config.block_m // (w.heads.num_heads // w.heads.num_kv_heads))
    step = layers.triton_step(queries_per_tile=per_tile, can_split=can_split, configs={phase: config})

    def run() -> None:
        step.begin()
        layers.attend(step)

    try:
        times = time_on_device(run, device=w.device, repeats=_REPEATS)
    except Exception as error:  # too much shared memory, or a compiler that gives up
        print(f"{config}: {type(error).__name__}")
        torch.cuda.synchronize()
        return math.inf
    return round(statistics.median(times) / w.num_layers * 1e6, 2)


def _print_best(phase: Phase, config: KernelConfig, workload: Workload) -> None:
    key = f"(Phase.{phase.name}, {padded_dim(workload.heads.dim)}, {workload.dtype.itemsize})"
    print(f"    {key}: KernelConfig{astuple(config)},", flush=True)
