"""The layer that trains the cores of many users: its output and every gradient against dense autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from service.engine.kernels.reference import adapter_delta
from tessera.defaults import LLAMA_LINEARS
from tessera.errors import UnsupportedModel
from tessera.model.base_model import BaseModel, iter_target_modules
from trainer_worker.training.lora.linear import BatchOwners, LoraDelta
from trainer_worker.training.trainable_linear import (
    Delta,
    RowOwners,
    RowRankDelta,
    TrainableLinear,
    trainable_modules,
)

ROWS = {
    "one user": [0, 0, 0],
    "all different": [2, 0, 1],
    "mixed": [1, 0, 1],
    "nobody of user 2": [0, 1, 1],
}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(("length", "rank"), [(1, 1), (5, 3), (7, 4)])
def test_row_rank_delta_passes_gradcheck(rows: list[int], length: int, rank: int) -> None:
    torch.manual_seed(0)
    h = random(3, length, rank).requires_grad_()
    R = random(3, rank, rank).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, R: RowRankDelta.apply(h, R, torch.tensor(rows)), (h, R))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_output_and_gradients_equal_dense_autograd(rows: list[int], bias: bool) -> None:
    torch.manual_seed(1)
    S, L, d_in, d_out, r, K = 3, 5, 11, 7, 4, 3
    linear = nn.Linear(d_in, d_out, bias=bias).double().requires_grad_(False)
    A, B, R = random(r, d_in), random(d_out, r), random(K, r, r).requires_grad_()
    x, upstream = random(S, L, d_in).requires_grad_(), random(S, L, d_out)
    layer = TrainableLinear(linear, "q")
    layer.delta = Delta(A, B, R, RowOwners(torch.tensor(rows)))
    y = layer(x)
    got = dict(zip(("dx", "dR"), torch.autograd.grad(y, (x, R), upstream), strict=True))

    slots = torch.tensor(rows).repeat_interleave(L)
    dense = linear(x) + adapter_delta(x.flatten(0, 1), A, B, R, slots).view(S, L, d_out)
    expected = dict(zip(("dx", "dR"), torch.autograd.grad(dense, (x, R), upstream), strict=True))
    torch.testing.assert_close(y, dense, atol=1e-12, rtol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for user in set(range(K)) - set(rows):
        assert not got["dR"][user].any()


def test_only_the_rank_activations_are_kept_for_the_delta() -> None:
    """Besides the shared W, A and B, the backward pass keeps h [S, L, r] and the rows' R, never x."""
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    layer = TrainableLinear(linear, "q")
    R = torch.randn(2, 4, 4, requires_grad=True)
    layer.delta = Delta(torch.randn(4, 64), torch.randn(48, 4), R, RowOwners(torch.tensor([0, 1])))
    frozen = {layer.weight.data_ptr(), layer.delta.A.data_ptr(), layer.delta.B.data_ptr()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 10, 64, requires_grad=True))
    activations = [tensor for tensor in kept if tensor.data_ptr() not in frozen]
    assert sum(tensor.numel() for tensor in activations) <= 2 * 10 * 4 + 2 * 4 * 4 + 2


def test_without_a_delta_it_is_the_layer_it_replaced() -> None:
    torch.manual_seed(2)
    linear = nn.Linear(6, 5)
    layer = TrainableLinear(linear, "q")
    x = torch.randn(2, 3, 6)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_target_modules_are_replaced_once_and_still_found(small: BaseModel) -> None:
    names = [name for name, _ in iter_target_modules(small.model, LLAMA_LINEARS)]
    state = small.model.state_dict()
    layers = trainable_modules(small.model, names)
    assert trainable_modules(small.model, names) == layers
    assert [name for name, _ in iter_target_modules(small.model, LLAMA_LINEARS)] == names
    after = small.model.state_dict()
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())


@pytest.mark.parametrize("shape", [(2 * 3, 6), (2, 1, 3, 6), (1, 6, 6)], ids=str)
def test_tokens_that_the_model_has_flattened_in_order_are_those_of_their_rows(shape: tuple[int, ...]) -> None:
    """OPT's MLP and shared experts receive [S · L, d], latent attention receives [S, 1, L, d]."""
    layer = TrainableLinear(nn.Linear(6, 5), "mlp.fc1")
    R = torch.randn(2, 2, 2)
    owners = RowOwners(torch.tensor([1, 0]), 3)
    layer.delta = Delta(torch.randn(2, 6), torch.randn(5, 2), R, owners)
    x = torch.randn(2, 3, 6)
    expected = layer(x)

    out = layer(x.view(shape))
    assert out.shape == (*shape[:-1], 5)
    torch.testing.assert_close(out.view(2, 3, 5), expected)


@pytest.mark.parametrize(("name", "num_tokens"), [("experts.0.up_proj", 6), ("mlp.up_proj", 4)])
def test_tokens_of_unknown_order_are_refused(name: str, num_tokens: int) -> None:
    layer = TrainableLinear(nn.Linear(6, 5), name)
    owners = RowOwners(torch.tensor([0, 0]), 3)
    layer.delta = Delta(torch.randn(2, 6), torch.randn(5, 2), torch.zeros(1, 2, 2), owners)
    with pytest.raises(UnsupportedModel, match=name):
        layer(torch.randn(num_tokens, 6))


@pytest.mark.parametrize("kind", ["core", "lora"])
def test_a_layer_may_read_the_sequences_one_after_the_other(kind: str) -> None:
    """Shared experts of a mixture receive [S · L, d] instead of [S, L, d]."""
    torch.manual_seed(3)
    S, L, d_in, d_out, r, K = 3, 5, 11, 7, 4, 2
    rows, linear = torch.tensor([1, 0, 1]), nn.Linear(d_in, d_out).double()
    x, upstream = random(S, L, d_in), random(S, L, d_out)
    owners = BatchOwners(rows, length=L)
    if kind == "core":
        layer: nn.Module = TrainableLinear(linear, "up")
        learned = random(K, r, r).requires_grad_()
        layer.delta = Delta(random(r, d_in), random(d_out, r), learned, owners)
    else:
        layer = linear
        learned = random(K, r, d_in).requires_grad_()
        scale = torch.tensor([1.0, 0.5], dtype=torch.float64)
        linear.register_forward_hook(LoraDelta("up", learned, random(K, d_out, r), scale, owners))
    results = []
    for shape in ((S, L), (S * L,)):
        y = layer(x.view(*shape, d_in))
        assert y.shape == (*shape, d_out)
        results.append((y.flatten(), torch.autograd.grad(y, learned, upstream.view_as(y))[0].flatten()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    with pytest.raises(UnsupportedModel, match="up receives"):
        layer(random(S * L - 3, d_in))


def test_tokens_without_rows_are_refused_by_name() -> None:
    layer = TrainableLinear(nn.Linear(6, 5), "experts.up_proj")
    layer.delta = Delta(
        torch.randn(2, 6), torch.randn(5, 2), torch.zeros(1, 2, 2), RowOwners(torch.tensor([0]))
    )
    with pytest.raises(UnsupportedModel, match=r"experts\.up_proj"):
        layer(torch.randn(8, 6))
