"""The same layers with other ways to serve adapters: what others do, in the same run.

* torch: h = A x, R and B by plain torch ops behind each GEMM, the consumers bare.
* LoRA: every user has an A and a B of their own, of the same rank, gathered per token (as Punica's BGMV;
  where every token has its own adapter, grouping tokens by adapter as SGMV does gives the same work). Shrink
  with split K, then expand: two launches a group. On a CPU by gathered `bmm`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.operators.stack import NUM_MODULES, Adapters, Step, Weights
from service.engine.kernels import adapter_delta, ops_for

#: Adds one group's delta to y: layer, group, x, y.
AddDelta = Callable[[int, str, Tensor, Tensor], None]


def torch_ops(step: Step, adapters: Adapters, token_slots: Tensor) -> Callable[[], Tensor]:
    """Shrink, core and expand per module in plain torch, over the bare weights."""
    groups = step.weights.geometry.groups

    def add(layer: int, name: str, x: Tensor, y: Tensor) -> None:
        _, widths, modules = groups[name]
        A = adapters.WA[layer][name][sum(widths) :].split(adapters.rank)  # type: ignore[no-untyped-call]
        B = adapters.factors[layer][name].B.split(widths)  # type: ignore[no-untyped-call]
        parts = y.split(widths, dim=1)  # type: ignore[no-untyped-call]
        for i, module in enumerate(modules):
            R_slots = adapters.R_slots[:, layer * NUM_MODULES + module]
            parts[i].add_(adapter_delta(x, A[i], B[i], R_slots, token_slots))

    return lambda: _run(step, add)


class Loras:
    """`num_slots` ordinary LoRAs: per layer and group A [S, g, r, d_in] and B [S, N, r]."""

    def __init__(self, weights: Weights, rank: int, num_slots: int) -> None:
        self.factors = [
            {
                name: (
                    weights.random(num_slots + 1, len(widths), rank, d_in),
                    weights.random(num_slots + 1, sum(widths), rank),
                )
                for name, (d_in, widths, _) in weights.geometry.groups.items()
            }
            for _ in range(weights.geometry.layers)
        ]


def lora(step: Step, loras: Loras, token_slots: Tensor) -> Callable[[], Tensor]:
    """Each user's own A and B, over the bare weights."""
    groups = step.weights.geometry.groups
    if step.weights.device.type == "cuda":
        from benchmarks.operators.lora_kernels import add_gathered
    else:
        add_gathered = _add_by_bmm

    def add(layer: int, name: str, x: Tensor, y: Tensor) -> None:
        add_gathered(y, x, *loras.factors[layer][name], token_slots, groups[name][1])

    return lambda: _run(step, add)


def _add_by_bmm(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, token_slots: Tensor, widths: tuple[int, ...]
) -> None:
    h = torch.einsum("tgrk,tk->tgr", A[token_slots], x)
    start = 0
    for i, width in enumerate(widths):
        own = B[token_slots, start : start + width]
        y[:, start : start + width] += torch.bmm(own, h[:, i, :, None])[:, :, 0]
        start += width


def _run(step: Step, add: AddDelta) -> Tensor:
    weights = step.weights
    residual = step.residual.clone()
    ops = ops_for(residual.device)
    x, squares = ops.rms_norm(residual, weights.norm), None
    for layer, weight in enumerate(weights.W):

        def product(name: str, x: Tensor, layer: int = layer, weight: dict[str, Tensor] = weight) -> Tensor:
            y = x @ weight[name].T
            add(layer, name, x, y)
            return y

        ops.qkv_rope(product("qkv", x), step.shape, step.rows, None, squares)
        x, squares = ops.add_residual(product("o", step.attended), residual, weights.norm)
        gated = ops.glu(product("gate_up", x), weights.geometry.ff, "silu", None, squares=squares)
        x, squares = ops.add_residual(product("down", gated), residual, weights.norm)
    return residual
