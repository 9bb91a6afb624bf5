"""The reference implementation of the fused ops against their definition: one adapter at a time, and the
modules of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from service.engine.kernels import (
    NO_MODULE,
    AddedDelta,
    GroupDelta,
    Norm,
    QKVShape,
    ResidualAdd,
    StepRows,
    stack_factors,
)
from service.engine.kernels.reference import (
    add_deltas,
    add_residual,
    add_rms_norm,
    glu,
    qkv_rope,
    rms_norm,
)
from tessera.formats.adapter import delta

T, RANK, D_IN, NUM_MODULES = 7, 4, 12, 3
SLOTS = torch.tensor([0, 1, 2, 2, 0, 3, 1])
DTYPE = torch.float64
NORM = Norm(torch.linspace(0.5, 1.5, 10, dtype=DTYPE), 1e-5)


class Layers:
    """Some linear layers side by side, the group that they form, and the output of each by itself."""

    def __init__(self, widths: list[int], modules: list[int]) -> None:
        torch.manual_seed(0)
        self.widths, self.modules = widths, modules
        self.x = torch.randn(T, D_IN, dtype=DTYPE)
        self.R_slots = torch.randn(4, NUM_MODULES, RANK, RANK, dtype=DTYPE)
        self.R_slots[0] = 0
        self.W = [torch.randn(width, D_IN, dtype=DTYPE) for width in widths]
        self.A = [torch.randn(RANK, D_IN, dtype=DTYPE) for _ in widths]
        self.B = [torch.randn(width, RANK, dtype=DTYPE) for width in widths]
        targets = [i for i, module in enumerate(modules) if module != NO_MODULE]
        self.weight = torch.cat([*self.W, *(self.A[i] for i in targets)])
        B = [part if i in targets else None for i, part in enumerate(self.B)]
        self.delta = GroupDelta(stack_factors(B, widths, modules, self.R_slots), SLOTS)

    @property
    def y(self) -> torch.Tensor:
        return self.x @ self.weight.T

    def outputs(self) -> list[torch.Tensor]:
        """The outputs by definition: y[t] = W x[t] + B R_slot A x[t], for each layer and token by itself."""
        results = []
        for W, A, B, module in zip(self.W, self.A, self.B, self.modules, strict=True):
            rows = self.x @ W.T
            if module != NO_MODULE:
                cores = self.R_slots[SLOTS, module]
                rows = rows + torch.stack([delta(self.x[t], A, cores[t], B) for t in range(T)])
            results.append(rows)
        return results


def test_glu() -> None:
    layers = Layers([10, 10], [2, 0])
    gate, up = layers.outputs()
    torch.testing.assert_close(glu(layers.y, 10, "silu", layers.delta), nn.functional.silu(gate) * up)
    torch.testing.assert_close(
        glu(layers.y, 10, "gelu_tanh", layers.delta), nn.functional.gelu(gate, approximate="tanh") * up
    )


@pytest.mark.parametrize("modules", [[2, 0, 1], [2, NO_MODULE, 1]], ids=["all", "without k"])
def test_qkv_rope(modules: list[int]) -> None:
    layers = Layers([32, 16, 16], modules)
    q, k, v = (part.view(1, T, -1, 8).transpose(1, 2) for part in layers.outputs())
    angles = torch.rand(T, 4, dtype=DTYPE)
    cos, sin = (torch.cat([part, part], 1) for part in (angles.cos(), angles.sin()))
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    K, V = torch.zeros(2, 3, 2, 4, 8, dtype=DTYPE)
    places = torch.tensor([7, 4, 0, 11, 5, 10, 1])  # two of them in block 0
    rows = StepRows(cos, sin, K, V, places // 4, places % 4)

    out = qkv_rope(layers.y, QKVShape(4, 2, 8, 8), rows, layers.delta)

    torch.testing.assert_close(out, q[0].transpose(0, 1))
    for t, place in enumerate(places.tolist()):
        for pages, own in ((K, k), (V, v)):
            expected = own[0, :, t] if place >= 4 else torch.zeros(2, 8, dtype=DTYPE)
            torch.testing.assert_close(pages[place // 4, :, place % 4], expected)
    assert int(K.abs().sum(-1).count_nonzero()) == 2 * 5, "nothing else is written"


def test_norms_are_those_of_transformers() -> None:
    x = torch.randn(T, 10)
    weight = NORM.weight.float()
    llama, gemma = LlamaRMSNorm(10, NORM.eps), Gemma2RMSNorm(10, NORM.eps)
    llama.weight.data, gemma.weight.data = weight, weight
    torch.testing.assert_close(rms_norm(x, Norm(weight, NORM.eps)), llama(x))
    torch.testing.assert_close(rms_norm(x, Norm(weight, NORM.eps, plus_one=True)), gemma(x))


def test_add_rms_norm_and_the_norm_put_off() -> None:
    layers = Layers([10], [1])
    start = torch.randn(T, 10, dtype=DTYPE)
    bias = torch.randn(10, dtype=DTYPE)
    expected = start + 0.5 * (layers.outputs()[0] + bias)
    how = ResidualAdd(bias, 0.5)

    residual = start.clone()
    normed = add_rms_norm(layers.y, residual, NORM, layers.delta, how)

    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(normed, rms_norm(expected, NORM))
    behind = Layers([10, 10], [0, 1])
    weight = torch.randn(28, 10, dtype=DTYPE)
    residual = start.clone()
    x, squares = add_residual(layers.y, residual, NORM, layers.delta, how)
    torch.testing.assert_close(residual, expected)
    late = glu(x @ weight.T, 10, "silu", behind.delta, squares=squares)
    torch.testing.assert_close(late, glu(normed @ weight.T, 10, "silu", behind.delta), rtol=1e-6, atol=1e-6)


def test_a_norm_behind_the_block() -> None:
    layers = Layers([10], [1])
    start = torch.randn(T, 10, dtype=DTYPE)
    residual = start.clone()
    out = add_rms_norm(layers.y, residual, None, layers.delta, ResidualAdd(post=NORM))
    assert out is residual
    torch.testing.assert_close(residual, start + rms_norm(layers.outputs()[0], NORM))


def test_add_deltas() -> None:
    layers = Layers([10, 5], [0, 2])
    y, h = layers.y[:, :15].clone(), layers.y[:, 15:]
    add_deltas(y, [AddedDelta(layers.delta.factors, SLOTS, h)])
    torch.testing.assert_close(y, torch.cat(layers.outputs(), 1))


def test_int8_is_scaled_by_slot_and_module() -> None:
    layers = Layers([10], [1])
    scales = torch.rand(4, NUM_MODULES) + 0.5
    values = torch.randint(-127, 128, layers.R_slots.shape, dtype=torch.int8)
    layers.R_slots.copy_(values.double() * scales[:, :, None, None].double())
    layers.R_slots[0] = 0
    factors = stack_factors([layers.B[0]], [10], [1], values, scales)
    y, h = layers.y[:, :10].clone(), layers.y[:, 10:]
    add_deltas(y, [AddedDelta(factors, SLOTS, h)])
    torch.testing.assert_close(y, layers.outputs()[0])
