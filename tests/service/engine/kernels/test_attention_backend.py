"""The choice of attention for a model, and the self-check of the fast one before it is used."""

from __future__ import annotations

import pytest
import torch

from service.engine.attention.backend import AttentionChoice, AttentionKind, choose_attention
from service.engine.attention.reference import AttentionOptions
from service.engine.kv.cache import KVShape, PagedKV
from tessera.errors import UnsupportedModel

LAYERS = [
    AttentionOptions(0.3),
    AttentionOptions(0.3, sliding_window=50, softcap=3.0),
    AttentionOptions(0.3, sinks=torch.tensor([0.0, 1.0, 2.0, -1.0])),
]


def make_kv(dim: int = 16, *, device: str = "cpu") -> PagedKV:
    shapes = [KVShape(1, dim, dim)] * len(LAYERS)
    return PagedKV(shapes, num_blocks=1, block_size=16, device=torch.device(device), dtype=torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted there")
def test_the_kernels_pass_their_trial() -> None:
    pytest.importorskip("triton")

    assert choose_attention(make_kv(), 4, LAYERS, setting="triton") == AttentionChoice(AttentionKind.TRITON)


def test_a_cpu_gets_the_plain_implementation() -> None:
    choice = choose_attention(make_kv(), 4, LAYERS)

    assert choice.kind == AttentionKind.TORCH
    assert "cpu" in choice.reason


def test_the_plain_implementation_can_be_demanded() -> None:
    assert choose_attention(make_kv(), 4, LAYERS, setting="torch").kind == AttentionKind.TORCH


def test_what_the_kernels_cannot_do_is_refused_only_if_they_are_demanded() -> None:
    kv = make_kv(dim=320)

    assert choose_attention(kv, 4, LAYERS).kind == AttentionKind.TORCH
    with pytest.raises(UnsupportedModel, match="320 dimensions"):
        choose_attention(kv, 4, LAYERS, setting="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gets_the_kernels() -> None:
    sinks = torch.tensor([0.0, 1.0, 2.0, -1.0], device="cuda")
    layers = [*LAYERS[:2], AttentionOptions(0.3, sinks=sinks)]

    assert choose_attention(make_kv(64, device="cuda"), 4, layers) == AttentionChoice(AttentionKind.TRITON)
