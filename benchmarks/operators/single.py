"""Each fused op alone: microseconds bare and with a delta, to see where a ratio of the stack comes from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from benchmarks.device_time import time_on_device
from benchmarks.operators.stack import Adapters, Step
from service.engine.kernels import GroupDelta, ops_for

#: Layers that take turns in one measured run, so that B and R come from where they come from in a model.
_MAX_LAYERS = 16


def single_ops(
    step: Step, adapters: Adapters, token_slots: Tensor
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Name, and a function of (layer, whether with a delta)."""
    weights, geometry = step.weights, step.weights.geometry
    ys = {
        name: [weights.random(step.num_tokens, WA.shape[0]) for WA in (layer[name] for layer in adapters.WA)]
        for name in geometry.groups
    }
    residual, norm = step.residual.clone(), weights.norm
    ops = ops_for(residual.device)
    _, squares = ops.add_residual(ys["o"][0], residual, norm)

    def delta(layer: int, name: str, has_delta: bool) -> GroupDelta | None:
        return GroupDelta(adapters.factors[layer][name], token_slots) if has_delta else None

    yield (
        "qkv_rope",
        lambda layer, has: ops.qkv_rope(
            ys["qkv"][layer], step.shape, step.rows, delta(layer, "qkv", has), squares
        ),
    )
    yield (
        "glu",
        lambda layer, has: ops.glu(
            ys["gate_up"][layer], geometry.ff, "silu", delta(layer, "gate_up", has), squares=squares
        ),
    )
    yield (
        "add_residual",
        lambda layer, has: ops.add_residual(ys["o"][layer], residual, norm, delta(layer, "o", has)),
    )
    yield (
        "add_rms_norm",
        lambda layer, has: ops.add_rms_norm(ys["o"][layer], residual, norm, delta(layer, "o", has)),
    )


def single_rows(
    step: Step, adapters: Adapters, token_slots: Tensor, repeats: int
) -> Iterator[dict[str, Any]]:
    layers = range(min(_MAX_LAYERS, step.weights.geometry.layers))
    for name, run in single_ops(step, adapters, token_slots):
        us = {}
        for has_delta in (False, True):
            times = time_on_device(
                lambda run=run, has=has_delta: [run(layer, has) for layer in layers],  # type: ignore[misc]
                device=step.weights.device,
                repeats=repeats,
            )
            us[has_delta] = statistics.median(times) / len(layers) * 1e6
        yield {
            "what": f"op {name}",
            "tokens": step.num_tokens,
            "rank": adapters.rank,
            "bare_us": round(us[False], 2),
            "delta_us": round(us[True], 2),
            "ratio": round(us[True] / us[False], 3),
        }
