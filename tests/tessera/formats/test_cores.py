"""What is trained becomes R: exact maps, gradients that are autograd's, and PEFT's own layers beside them."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import Tensor, nn

from tessera.formats.cores import CoreParametrization, FreeCores, OrthogonalCores, SpannedCores

M, r, u = 5, 4, 3
GROUPS = torch.tensor([0, 0, 1, 1, 1])
KINDS = ["free", "spanned", "rotations", "rotations with b", "rotations with a", "both", "neumann"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: str) -> CoreParametrization:
    P_in = torch.eye(r).double() + 0.2 * random(M, r, r, seed=1)
    P_out = torch.eye(r).double() + 0.2 * random(M, r, r, seed=2)
    if kind == "free":
        return FreeCores(P_in, P_out)
    if kind == "spanned":
        return SpannedCores(P_out[:, None] @ random(M, u, r, r, seed=3) @ P_in[:, None], GROUPS)
    scales = {"rotations": (), "rotations with b": ("b",), "rotations with a": ("a",)}.get(kind, ("b", "a"))
    return OrthogonalCores(P_in, P_out, scales=scales, terms=5 if kind == "neumann" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_the_base_model(kind: str) -> None:
    cores = make(kind)
    assert len(cores.shape) == 3
    torch.testing.assert_close(cores.expand(torch.zeros(cores.shape).double()), torch.zeros(M, r, r).double())
    torch.testing.assert_close(
        cores.solve(torch.zeros(M, r, r)), torch.zeros(cores.shape).double(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_and_of_each_user_alone(kind: str) -> None:
    cores = make(kind)
    theta = 0.3 * random(2, *cores.shape, seed=4)
    weights = random(2, M, r, r, seed=5)
    for user in range(2):
        leaf = theta[user].clone().requires_grad_()
        (cores.expand(leaf) * weights[user]).sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(cores.gradient(theta, weights)[user], leaf.grad, rtol=1e-10, atol=1e-12)
        numeric = torch.autograd.gradcheck(cores.expand, [theta[user].clone().requires_grad_()])
        assert numeric


def test_the_gradient_of_a_tied_vector_is_the_sum_of_inner_products() -> None:
    cores = make("spanned")
    assert isinstance(cores, SpannedCores)
    grad = random(M, r, r, seed=5)
    found = cores.gradient(torch.zeros(1, 2, u).double(), grad)
    for group, i in ((0, 0), (1, 2)):
        members = [m for m in range(M) if int(GROUPS[m]) == group]
        expected = sum(float((cores.directions[m, i] * grad[m]).sum()) for m in members)
        assert float(found[0, group, i]) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-4, 0.3])
def test_a_core_that_was_expanded_is_found_again(kind: str, size: float) -> None:
    cores = make(kind)
    R = cores.expand(size * random(*cores.shape, seed=6))
    # A Neumann series ends, and what is left out counts the more, the larger S is.
    tolerance = {1e-4: 1e-9, 0.3: 0.05}[size] if kind == "neumann" else 1e-12
    assert cores.relative_loss(R) < tolerance


@pytest.mark.parametrize("kind", ["spanned", "rotations", "both"])
def test_what_cannot_be_expressed_is_measured(kind: str) -> None:
    assert make(kind).relative_loss(random(M, r, r, seed=8)) > 0.05


def test_stretched_axes_are_found_where_nothing_is_rotated() -> None:
    """All scales fit the equations there, so the ones nearest to 1 must still give the same core."""
    cores = make("both")
    theta = torch.zeros(cores.shape).double()
    theta[:, 0, -2 * r :] = 0.2 * random(M, 2 * r, seed=3)
    R = cores.expand(theta)
    torch.testing.assert_close(cores.expand(cores.solve(R)), R, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gain_is_the_size_of_a_step_of_signs(kind: str) -> None:
    cores = make(kind)
    signs = torch.sign(random(400, *cores.shape, seed=9))
    step = cores.expand(1e-5 * signs) / 1e-5
    measured = float(step.square().sum((2, 3)).mean(0).sqrt().mean()) / r
    assert cores.gain() == pytest.approx(measured, rel=0.35)
    narrow = cores.to(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(
        narrow.expand(signs.float()), cores.expand(signs).float(), rtol=1e-3, atol=1e-3
    )


# PEFT's own layers


def psoft_layer(**options: object) -> tuple[nn.Linear, peft.tuners.psoft.Linear]:
    torch.manual_seed(0)
    base = nn.Linear(12, 10, bias=False).double().float()
    config = peft.PsoftConfig(r=r, psoft_alpha=7, **options)
    layer = peft.tuners.psoft.Linear(base, "default", config)
    return base, layer


@pytest.mark.parametrize("terms", [0, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("scales", [("b", "a"), ("b",), ("a",), ()])
def test_a_rotation_is_that_of_peft(terms: int, scales: tuple[str, ...]) -> None:
    base, layer = psoft_layer(
        psoft_mag_a="a" in scales, psoft_mag_b="b" in scales, use_cayley_neumann=terms > 0,
        num_cayley_neumann_terms=max(terms, 1),
    )  # fmt: skip
    orth = layer.psoft_R["default"]
    parts = [orth.weight]
    orth.weight.data = 0.4 * random(r * (r - 1) // 2, seed=1).float()
    for name in scales:
        vector = getattr(orth, f"vector_{name}")
        vector.data = 1 + 0.3 * random(r, seed=ord(name)).float()
        parts.append(vector - 1)
    U, S, Vh = torch.linalg.svd(base.weight.detach().double())
    P_out, P_in = torch.diag(S[:r])[None], torch.eye(r).double()[None]
    cores = OrthogonalCores(P_in, P_out, scales=scales, terms=terms)
    theta = torch.cat([part.detach().double() for part in parts])[None, None]
    delta = U[:, :r] @ cores.expand(theta)[0] @ Vh[:r]
    torch.testing.assert_close(delta.float(), layer.get_delta_weight("default").detach(), rtol=0, atol=2e-6)
    if terms == 0:
        Q = orth.get_matrix() if not scales else None
        assert Q is None or torch.allclose(Q @ Q.T, torch.eye(r), atol=1e-5)


def test_spanned_cores_are_those_of_peft() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(M)))
    config = peft.TinyLoraConfig(r=r, u=u, weight_tying=0.6, target_modules=[str(m) for m in range(M)])
    tuned = peft.get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = random(u, seed=parameter.data_ptr() % 97).float()
    layers = [tuned.base_model.model[m] for m in range(M)]
    groups = torch.tensor([int(layer._tinylora_v_key["default"]) for layer in layers])
    assert groups.tolist() == [0, 0, 1, 1, 1]
    P = torch.stack([layer.tinylora_P["default"] for layer in layers]).double()
    v = torch.stack([tuned.base_model.tinylora_v["default"][str(g)] for g in range(2)]).detach().double()
    R = SpannedCores(P, groups).expand(v[None])
    for m, layer in enumerate(layers):
        delta = layer.tinylora_B["default"].double() @ R[m] @ layer.tinylora_A["default"].double()
        torch.testing.assert_close(
            delta.float(), layer.get_delta_weight("default").detach(), rtol=0, atol=1e-5
        )
    assert math.prod(SpannedCores(P, groups).shape) == 2 * u
