"""What else attends: torch's own, over dense K and V of the same sizes, which no paged cache has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention.workload import Workload


def peers(workload: Workload) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name, and a run over as many layers as the workload has. Nothing for queries in the middle of a
    context, which dense attention cannot mask."""
    w = workload
    if w.queries not in (1, w.context):
        return
    yield "torch SDPA, dense K and V", _sdpa(w)
    if w.device.type == "cuda" and w.dtype != torch.float32:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # from torch 2.12 on
            yield "torch varlen, dense K and V", _varlen(w, varlen_attn)


def _sdpa(w: Workload) -> Callable[[], Tensor]:
    size = (w.num_layers, w.batch, w.heads.num_kv_heads, w.context, w.heads.dim)
    K, V = (torch.randn(size, device=w.device, dtype=w.dtype) for _ in range(2))
    q = torch.randn(w.batch, w.heads.num_heads, w.queries, w.heads.dim, device=w.device, dtype=w.dtype)

    def run() -> Tensor:
        for k, v in zip(K, V, strict=True):
            out = scaled_dot_product_attention(q, k, v, is_causal=w.queries > 1, enable_gqa=True)
        return out

    return run


def _varlen(w: Workload, varlen_attn: Callable[..., Any]) -> Callable[[], Tensor]:
    size = (w.num_layers, w.batch * w.context, w.heads.num_kv_heads, w.heads.dim)
    K, V = (torch.randn(size, device=w.device, dtype=w.dtype) for _ in range(2))
    q = torch.randn(w.batch * w.queries, w.heads.num_heads, w.heads.dim, device=w.device, dtype=w.dtype)
    starts_q, starts_k = (
        torch.arange(0, (w.batch + 1) * count, count, dtype=torch.int32, device=w.device)
        for count in (w.queries, w.context)
    )
    options = {"window_size": (-1, 0), "enable_gqa": True}

    def run() -> Tensor:
        for k, v in zip(K, V, strict=True):
            out: Tensor = varlen_attn(q, k, v, starts_q, starts_k, w.queries, w.context, **options)
        return out

    return run
