"""LoRAM (methods catalogue M1 to M6; the two processes of M5 stand in test_generic)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from tessera.errors import CorruptRecord, InvalidInput
from tessera.formats.manifest import BasisManifest
from tessera.methods.algebra.loram_sines import dst_columns
from tessera.methods.bases import build_basis
from tessera.methods.bases.lora_ga import lora_form
from tessera.methods.bases.loram import log_share, regenerate
from tessera.methods.building.activations import ScaledMoment
from tessera.methods.building.method import ModuleData
from tessera.methods.checks import check_loram
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import (
    decaying_matrix,
    factorise,
    module_data,
    orthonormal,
    random_matrix,
)


def nu(X: Tensor) -> float:
    """ν[X] = ‖X‖_F² / entries."""
    return float(X.square().mean())


@pytest.mark.parametrize("width", [5, 64, 100, 257])
def test_m1_phi_is_the_orthogonal_sine_transform(width: int) -> None:
    full = dst_columns(width, width)
    i = torch.arange(1, width + 1, dtype=torch.float64)
    expected = math.sqrt(2 / (width + 1)) * torch.sin(torch.outer(i, i) * math.pi / (width + 1))

    torch.testing.assert_close(full, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(full, full.T, rtol=0, atol=0)
    torch.testing.assert_close(full.T @ full, torch.eye(width).double(), rtol=0, atol=1e-13)
    some = dst_columns(width, 3)
    torch.testing.assert_close(some.T @ some, torch.eye(3).double(), rtol=0, atol=1e-13)
    assert nu(full) == pytest.approx(1 / width, rel=1e-12)


def test_m2_magnitudes() -> None:
    m, n, r = 40, 64, 8
    W = decaying_matrix(m, n)
    found = factorise("loram", module_data(W, r))
    Q = math.log(r) / math.log(min(m, n))

    assert nu(found.B @ found.A) == pytest.approx(Q * nu(W), rel=1e-10)
    beta_squared = math.sqrt(Q / r) * float(torch.linalg.matrix_norm(W))
    assert found.notes["s"] == pytest.approx(beta_squared, rel=1e-10)
    Phi = dst_columns(m, r) @ dst_columns(n, r).T
    assert beta_squared == pytest.approx((Q * nu(W) / nu(Phi)) ** 0.5, rel=1e-10)
    k1 = r * (n * nu(found.A) ** 2 + m * nu(found.B) ** 2)  # eq. 6 with σ² = ν
    assert k1 == pytest.approx(Q * (m + n) * nu(W), rel=1e-10)


def test_m2_variants_of_q_and_tracking() -> None:
    W = decaying_matrix(40, 64)
    data = module_data(W, 8)
    for magnitude, factor in (("log_half", 0.5), ("log", 1), ("log_double", 2)):
        assert log_share(8, 40, magnitude) == pytest.approx(math.log(8 * factor) / math.log(40))
        found = factorise("loram", data, magnitude=magnitude)
        assert nu(found.B @ found.A) == pytest.approx(log_share(8, 40, magnitude) * nu(W), rel=1e-10)
    assert log_share(39, 40, "log_double") == 1
    for reference in ("pissa", "milora", "olora"):
        tracked = factorise("loram", data, magnitude="tracking", reference=reference)
        other = factorise(reference, data)
        assert nu(tracked.B @ tracked.A) == pytest.approx(nu(other.B @ other.A), rel=1e-10)


@pytest.mark.parametrize("reference", ["pissa", "milora", "olora", "corda", "lora_ga"])
def test_m2_tracking_by_product_or_by_factor(reference: str) -> None:
    """By product ν[B A] is the reference's, by factor ν[A] and ν[B] are, and with them eq. 6's k_1."""
    m, n, r = 40, 64, 8
    data = module_data(decaying_matrix(m, n), r, inputs=scaled_moment(n))
    A_ref, B_ref = reference_factors(reference, data)
    product, factors = (
        factorise("loram", data, magnitude="tracking", reference=reference, tracking=kind)
        for kind in ("product", "factor")
    )

    assert nu(product.B @ product.A) == pytest.approx(nu(B_ref @ A_ref), rel=1e-10)
    assert nu(factors.A) == pytest.approx(nu(A_ref), rel=1e-10)
    assert nu(factors.B) == pytest.approx(nu(B_ref), rel=1e-10)
    for found, phi in ((factors.A.T, dst_columns(n, r)), (factors.B, dst_columns(m, r))):
        torch.testing.assert_close(found / found.norm() * r**0.5, phi, rtol=1e-10, atol=1e-12)
    k1 = r * (n * nu(A_ref) ** 2 + m * nu(B_ref) ** 2)
    core = factorise("loram", data, magnitude="tracking", reference=reference, tracking="factor", rule="core")
    s = core.notes["s"]
    assert s**4 * r**2 / (m * n) == pytest.approx(k1, rel=1e-10), "ν[ΔW] of a step of the core"
    differs = abs(nu(factors.B @ factors.A) / nu(B_ref @ A_ref) - 1) > 1e-6
    assert differs == (reference not in ("olora", "lora_ga")), "they agree for an orthonormal factor"


def test_m2_tracking_lora_ga_needs_no_gradient() -> None:
    """LoRA-GA's ArB2r pair has c² r as its norms and c⁴ r as its product's, c² = √d_out / γ, for any g."""
    m, n, r = 40, 64, 8
    tracked = factorise(
        "loram", module_data(decaying_matrix(m, n), r), magnitude="tracking", reference="lora_ga"
    )
    for seed in range(3):
        A0, B0 = lora_form(random_matrix(m, n, seed=seed), r)
        assert nu(tracked.B @ tracked.A) == pytest.approx(nu(B0 @ A0), rel=1e-10)
    assert nu(tracked.B @ tracked.A) == pytest.approx((m**0.5 / 16) ** 2 * r / (m * n), rel=1e-10)


def test_m2_tracking_by_factor_needs_a_method_to_track() -> None:
    with pytest.raises(InvalidInput, match="needs magnitude=tracking") as caught:
        check_loram(8, {"rule": "factor", "magnitude": "log", "tracking": "factor"})
    assert caught.value.param == "tracking"


def scaled_moment(width: int) -> ScaledMoment:
    """CorDA's C of inputs with correlated directions."""
    rule = ScaledMoment(width)
    x = random_matrix(300, width, seed=3) * torch.linspace(2, 0.2, width) @ orthonormal(width, width, seed=4)
    rule.observe(x, [100, 120, 80])
    return rule


def reference_factors(reference: str, data: ModuleData) -> tuple[Tensor, Tensor]:
    """A_0 and B_0 of the method as its own file computes them."""
    if reference == "lora_ga":
        return lora_form(random_matrix(*data.weight.shape, seed=9), data.rank)
    found = factorise(reference, data)
    return found.A, found.B


def test_m2_rule_for_a_frozen_pair() -> None:
    """s = (Q (m + n) ν[W] m n / r²)^{1/4}: a step on R changes W as much as the paper's on A and B.

    Monte Carlo with independent gradients of variance 1. The paper's k_1 leaves out that its two terms
    overlap, which adds 2 r / (m + n) of it.
    """
    m, n, r, eta = 40, 64, 8, 1.0
    W = decaying_matrix(m, n)
    pair = factorise("loram", module_data(W, r))
    core = factorise("loram", module_data(W, r), rule="core")
    changes = {"pair": 0.0, "core": 0.0}
    for seed in range(400):
        g = random_matrix(m, n, seed=seed)
        changes["pair"] += nu(eta * (pair.B @ pair.B.T @ g + g @ pair.A.T @ pair.A)) / 400
        R = eta * core.B.T @ g @ core.A.T
        changes["core"] += nu(core.B @ R @ core.A) / 400
    k1 = math.log(8) / math.log(40) * (m + n) * nu(W)

    assert changes["core"] == pytest.approx(k1, rel=0.02)
    assert changes["pair"] == pytest.approx(k1 * (1 + 2 * r / (m + n)), rel=0.02)
    assert factorise("loram", module_data(W, r), rule="none").notes["s"] == 1


def test_m3_pissas_magnitude() -> None:
    """Eq. 10: k_1(PiSSA) = Q (m + n) ν[W] with the true Q = (Σ_{i≤r} s_i)² / (r Σ s_i²) <= 1."""
    m, n, r = 40, 64, 8
    W = decaying_matrix(m, n)
    found = factorise("pissa", module_data(W, r))
    s = torch.linalg.svdvals(W)
    Q = float(s[:r].sum() ** 2 / (r * s.square().sum()))

    k1 = r * (n * nu(found.A) ** 2 + m * nu(found.B) ** 2)
    assert k1 == pytest.approx(Q * (m + n) * nu(W), rel=1e-10)
    for rank in range(1, 41):
        assert float(s[:rank].sum() ** 2 / (rank * s.square().sum())) <= 1


@pytest.mark.parametrize(("optimiser", "power"), [("sgd", 2), ("adam", 1)])
def test_m4_proposition_1_on_a_network(optimiser: str, power: int) -> None:
    """Their set-up, narrower: scaling A and B at the start is a learning rate for each (SGD: α², Adam: α)."""
    alpha_A, alpha_B = 3.0, 0.5
    plain = train_network(optimiser, alpha=alpha_A * alpha_B, start=(1.0, 1.0), rates=(1.0, 1.0))
    scaled = train_network(
        optimiser, alpha=1.0, start=(alpha_A, alpha_B), rates=(alpha_A**power, alpha_B**power)
    )
    control = train_network(optimiser, alpha=1.0, start=(alpha_A, alpha_B), rates=(1.0, 1.0))

    torch.testing.assert_close(scaled, plain, rtol=1e-10, atol=1e-10)
    assert float((control / plain - 1).abs().max()) > 1e-2


def train_network(
    optimiser: str, *, alpha: float, start: tuple[float, float], rates: tuple[float, float]
) -> Tensor:
    """Losses [15] of a five-layer network of which the LoRA factors are trained, rank 5, width 40."""
    width, rank, lr = 40, 5, 3e-1 if optimiser == "sgd" else 1e-2
    Ws = [random_matrix(width, width, seed=i) / width**0.5 for i in range(5)]
    As = [(start[0] * random_matrix(rank, width, seed=i + 10)).requires_grad_() for i in range(5)]
    Bs = [(start[1] * random_matrix(width, rank, seed=i + 20)).requires_grad_() for i in range(5)]
    groups = [{"params": As, "lr": lr * rates[0]}, {"params": Bs, "lr": lr * rates[1]}]
    step: torch.optim.Optimizer
    step = torch.optim.SGD(groups) if optimiser == "sgd" else torch.optim.Adam(groups, eps=1e-30)
    x, target = random_matrix(32, width, seed=30), random_matrix(32, width, seed=31)
    losses = []
    for _ in range(15):
        h = x
        for W, A, B in zip(Ws, As, Bs, strict=True):
            h = nn.functional.silu(h @ (W + 0.05 * alpha * B @ A).T)
        loss = (h - target).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_m5_the_manifest_gives_the_basis_bit_for_bit(small: BaseModel, dtype: str) -> None:
    basis = build_basis(small, method="loram", rank=4, dtype=dtype, scale=0.3, rule="core")

    again = regenerate(BasisManifest.from_json(basis.manifest.to_json()))

    assert again.digest() == basis.basis_id
    assert list(again.module_bytes()) == list(basis.module_bytes())
    assert again.preconditioner_bytes() == basis.preconditioner_bytes()
    for index, module in enumerate(basis.manifest.modules):
        s = 0.3 * basis.manifest.recipe["notes"]["s"][index]
        torch.testing.assert_close(
            basis.P_out[index] @ basis.P_in[index], s * torch.eye(4), rtol=1e-6, atol=0
        )
        assert basis.A[index].shape == (4, module.d_in)
    recipe = {**basis.manifest.recipe, "notes": {"s": [1.0] * basis.num_modules}}
    with pytest.raises(CorruptRecord, match="has other bytes"):
        regenerate(dataclasses.replace(basis.manifest, recipe=recipe))
    with pytest.raises(CorruptRecord, match="not one of LoRAM's"):
        regenerate(dataclasses.replace(basis.manifest, recipe={}))


def test_m5_sines_are_correctly_rounded() -> None:
    """Against math.sin at small angles, where its rounding is the only error, and by symmetry."""
    from tessera.methods.algebra.loram_sines import _sines

    width = 1023
    sines = _sines(width)
    assert len(sines) == 2 * (width + 1)
    assert sines[512] == 1.0
    assert sines[0] == sines[1024] == 0.0
    for k in range(1, 1024):
        assert sines[k] == pytest.approx(
            math.sin(k * math.pi / 1024), rel=3e-16 * max(1, 4 * min(k, 1024 - k) / k)
        )
        assert sines[k] == sines[1024 - k] == -sines[1024 + k]


@pytest.mark.parametrize(("rank", "magnitude"), [(1, "log"), (2, "log_half"), (1, "log_half")])
def test_m6_a_rank_without_magnitude_is_refused(small: BaseModel, rank: int, magnitude: str) -> None:
    with pytest.raises(InvalidInput, match=f"0 at rank {rank}") as caught:
        build_basis(small, method="loram", rank=rank, magnitude=magnitude)
    assert caught.value.param == "rank"
    build_basis(small, method="loram", rank=rank, rule="none")
