"""LoLoRA (methods catalogue L1 to L7) and the choice of B."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.bases import CalibrationSet, build_basis
from tessera.methods.building.activations import SecondMoment
from tessera.methods.building.collected import Needs
from tessera.methods.building.decomposition import smallest_eigenvectors
from tessera.methods.building.gradients import collect
from tessera.methods.building.hebbian import HebbianConfig, HebbianRule, local_gradient, online_delta
from tessera.methods.building.losses import example_losses
from tessera.methods.building.output_space import output_space
from tessera.methods.building.targets import find_targets
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import (
    chordal,
    module_data,
    orthonormal,
    random_matrix,
    small_calibration,
    small_model,
    text_of,
)

WIDTH, RANK = 64, 4


class Stream:
    """Inputs with covariance eigenvalues 1/k and a mean vector; top: [r, n], the true principal space."""

    def __init__(self, *, with_mean: bool = True) -> None:
        self.Q = orthonormal(WIDTH, WIDTH, seed=5).float()
        self.values = (torch.arange(1, WIDTH + 1) ** -1.0).sqrt()
        self.mean = torch.randn(WIDTH, generator=torch.Generator().manual_seed(6)) * with_mean
        self.generator = torch.Generator().manual_seed(7)
        self.top = self.Q[:, :RANK].T

    def batch(self, num_tokens: int = 512) -> Tensor:
        noise = torch.randn(num_tokens, WIDTH, generator=self.generator)
        return noise * self.values @ self.Q.T + self.mean


def learn(config: HebbianConfig, *, num_steps: int) -> tuple[HebbianRule, Stream]:
    stream = Stream()
    rule = HebbianRule(WIDTH, RANK, config, generator=torch.Generator().manual_seed(0))
    for _ in range(num_steps):
        rule.observe(stream.batch())
    return rule, stream


def expected_loss(A: Tensor, targets: Tensor, Sigma: Tensor, B: Tensor | None) -> float:
    """½ E‖(ΔW - B R A) z‖² at the best R (and B, if None), over random targets [K, m, n]; A: [r, n] any."""
    root = torch.linalg.cholesky(Sigma)
    AS = A @ root
    P = AS.T @ torch.linalg.inv(AS @ AS.T) @ AS  # projection on the row space of A Σ^½
    left = targets @ root
    kept = left @ P
    if B is not None:
        Q = torch.linalg.qr(B)[0]
        kept = Q @ (Q.T @ kept)
    return float((left - kept).square().sum((1, 2)).mean() / 2)


def test_l1_theorem_4_4_principal_components_are_optimal() -> None:
    """min_B over random targets of variance σ²: g(A) = ½σ² m (tr Σ - tr VᵀΣV), least at the top."""
    m, n, r = 12, 10, 3
    Q = orthonormal(n, n)
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -1.0
    Sigma = Q * values @ Q.T
    targets = random_matrix(3000, m, n, seed=1)
    top = Q[:, :r].T

    minimum = expected_loss(top, targets, Sigma, None)
    assert minimum == pytest.approx(0.5 * m * float(values[r:].sum()), rel=0.01)
    mixed = random_matrix(r, r, seed=2) @ top
    assert expected_loss(mixed, targets, Sigma, None) == pytest.approx(minimum, rel=1e-9), "A → C A"
    for seed in range(20):
        eigen = Q[:, torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:r]].T
        formula = 0.5 * m * float(values.sum() - (eigen @ Sigma @ eigen.T).trace())
        assert expected_loss(eigen, targets, Sigma, None) == pytest.approx(formula, rel=0.01)
        other = orthonormal(n, r, seed=seed).T
        assert expected_loss(other, targets, Sigma, None) >= minimum * (1 - 1e-9)


def test_l2_theorem_4_5_and_a_frozen_output_space() -> None:
    """min_A h(B) = ½σ²(m - rk B) tr Σ; both frozen: ½σ²(m tr Σ - r tr VᵀΣV) whatever orthonormal B is."""
    m, n, r = 12, 10, 3
    Q = orthonormal(n, n)
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -1.0
    Sigma = Q * values @ Q.T
    targets = random_matrix(3000, m, n, seed=1)
    top = Q[:, :r].T

    for B in (orthonormal(m, r, seed=3), random_matrix(m, r, seed=4)):
        only_B = expected_loss(torch.eye(n).double(), targets, Sigma, B)
        assert only_B == pytest.approx(0.5 * (m - r) * float(values.sum()), rel=0.01)
        both = expected_loss(top, targets, Sigma, B)
        assert both == pytest.approx(0.5 * float(m * values.sum() - r * values[:r].sum()), rel=0.01)


def test_l3_the_autoencoder_rule_is_its_gradient() -> None:
    z = random_matrix(50, 10)
    A = random_matrix(3, 10, seed=1).requires_grad_()
    (0.5 * (z - z @ A.T @ A).square().sum(1).mean()).backward()

    assert A.grad is not None
    torch.testing.assert_close(local_gradient("ae", A.detach(), z), A.grad, rtol=1e-12, atol=1e-12)
    u = z @ A.detach().T
    snl = -(u.T @ z - u.T @ u @ A.detach()) / 50
    torch.testing.assert_close(local_gradient("hpca", A.detach(), z), snl, rtol=1e-12, atol=1e-12)


def test_l3_softhebb_as_cited_and_as_in_the_later_code() -> None:
    """Moraitis et al. 2022: Δa_k = y_k (z - u_k a_k), y = softmax(u). Later code: losers have -y_k."""
    z, A = random_matrix(50, 10), random_matrix(3, 10, seed=1)
    cited, later = torch.zeros(3, 10).double(), torch.zeros(3, 10).double()
    for token in z:
        u = A @ token
        y = u.exp() / u.exp().sum()
        for k in range(3):
            change = y[k] * (token - u[k] * A[k])
            cited[k] += change
            later[k] += change if k == int(y.argmax()) else -change

    torch.testing.assert_close(local_gradient("softhebb_plain", A, z), -cited / 50, rtol=1e-12, atol=1e-12)
    found = local_gradient("softhebb", A, z)
    torch.testing.assert_close(found, -later / later.abs().max(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rule", "svd_first"), [("hpca", False), ("ae", False), ("hpca", True)])
def test_l4_rules_find_the_principal_space(rule: str, svd_first: bool) -> None:
    config = HebbianConfig(rule=rule, lr=1e-4 if svd_first else 1.5e-3, svd_first=svd_first)
    learned, stream = learn(config, num_steps=1000)

    assert chordal(learned.A, stream.top) < 0.1
    gram = learned.A @ learned.A.T - torch.eye(RANK)
    assert float(torch.linalg.matrix_norm(gram)) < (5e-3 if not svd_first else 5e-2)
    assert learned.num_steps == 1000


def test_l4_the_first_batch_is_a_good_start() -> None:
    early, stream = learn(HebbianConfig(lr=1e-4, svd_first=True), num_steps=30)
    cold, _ = learn(HebbianConfig(), num_steps=30)

    assert chordal(early.A, stream.top) < 0.4 < 1.2 < chordal(cold.A, stream.top)
    with pytest.raises(InvalidInput, match="3 tokens, too few for 4"):
        HebbianRule(WIDTH, RANK, HebbianConfig(svd_first=True), generator=torch.Generator()).observe(
            random_matrix(3, WIDTH)
        )


@pytest.mark.parametrize("rule", ["softhebb", "softhebb_plain"])
def test_l4_softhebb_does_not(rule: str) -> None:
    learned, stream = learn(HebbianConfig(rule=rule), num_steps=1000)

    assert chordal(learned.A, stream.top) > 0.8


def test_l5_without_centring_one_direction_goes_to_the_mean() -> None:
    learned, stream = learn(HebbianConfig(is_centred=False), num_steps=2000)

    assert chordal(learned.A, stream.top) == pytest.approx(1.0, abs=0.05)
    mean = stream.mean / stream.mean.norm()
    Q = torch.linalg.qr(learned.A.T)[0]
    assert float((Q.T @ mean).norm()) > 0.98, "the mean is in the learned space"


def test_l5_the_mean_runs_and_begins_with_the_first_batch() -> None:
    """μ ← 0.98 μ + 0.02 mean z, from the first mean; the rule sees z - μ with the μ that has seen z."""
    rule = HebbianRule(WIDTH, RANK, HebbianConfig(), generator=torch.Generator().manual_seed(0))
    first, second = random_matrix(50, WIDTH) + 3, random_matrix(30, WIDTH, seed=1) - 2

    rule.step(first)
    assert rule.mean is not None
    torch.testing.assert_close(rule.mean, first.mean(0))
    rule.step(second)
    torch.testing.assert_close(rule.mean, 0.98 * first.mean(0) + 0.02 * second.mean(0))


def test_l6_the_forward_pass_uses_the_old_a_uncentred() -> None:
    rule = HebbianRule(WIDTH, RANK, HebbianConfig(), generator=torch.Generator().manual_seed(0))
    x, B = Stream().batch(64), random_matrix(5, RANK, dtype=torch.float32).requires_grad_()
    before = rule.A.clone()

    y = online_delta(x, rule, B)

    torch.testing.assert_close(y, x @ before.T @ B.T)
    assert not torch.equal(rule.A, before), "and then it learns"
    y.square().sum().backward()
    assert not rule.A.requires_grad
    assert rule.A.grad is None
    assert B.grad is not None


def test_l6_the_input_is_not_kept_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    rule = HebbianRule(WIDTH, RANK, HebbianConfig(), generator=torch.Generator().manual_seed(0))
    x, B = Stream().batch(64), random_matrix(5, RANK, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        online_delta(x, rule, B)

    assert kept, "u is kept"
    assert (64, RANK) in kept
    assert (64, WIDTH) not in kept


def test_l7_the_principal_space_moves_as_the_model_is_trained() -> None:
    """Fig. 4: the distance from the initial optimal subspace grows, and fastest at the start."""
    base = small_model()
    base = BaseModel(base.name, base.model_id, copy.deepcopy(base.model))
    calibration = small_calibration(16)
    weights = [parameter for parameter in base.model.parameters() if parameter.dim() == 2]

    def principal_space() -> Tensor:
        needs = Needs(inputs=lambda name, width: SecondMoment(width))
        target = [t for t in find_targets(base.model, ["down_proj"], 1) if ".1." in t.name]
        rule = collect(base, target, text_of(calibration), needs)[0].inputs
        assert isinstance(rule, SecondMoment)
        return smallest_eigenvectors(-rule.covariance, RANK).T

    initial = principal_space()
    optimiser = torch.optim.SGD(weights, lr=0.01)
    distances = []
    for _ in range(4):
        for weight in weights:
            weight.requires_grad_()
        for _ in range(6):
            optimiser.zero_grad()
            for batch in calibration.batches():
                example_losses(base, batch).mean().backward()
            optimiser.step()
        for weight in weights:
            weight.requires_grad_(False)
        distances.append(chordal(principal_space(), initial))

    assert distances == sorted(distances)
    assert distances[0] > distances[-1] / 4


@pytest.mark.parametrize("rule", ["hpca", "ae", "softhebb"])
@pytest.mark.parametrize("output_rule", ["wa", "grad", "y", "random"])
def test_lolora_builds_with_every_rule(
    small: BaseModel, calibration: CalibrationSet, rule: str, output_rule: str
) -> None:
    data = calibration if output_rule in ("grad", "y") else text_of(calibration)
    basis = build_basis(
        small,
        method="lolora",
        rank=4,
        calibration=data,
        rule=rule,
        output_rule=output_rule,
        tokens_per_step=32,
    )

    assert basis.manifest.recipe["notes"]["num_steps"] == [round(calibration.num_tokens / 32)] * 14
    assert basis.A[0] is not basis.A[1]
    torch.testing.assert_close(basis.A[0], basis.A[1]), "query and key read the same input"


def test_lolora_agrees_with_eva_after_the_first_batch(small: BaseModel) -> None:
    """On one batch, the SVD start is the PCA of it, and one small step barely moves it."""
    text = text_of(small_calibration(lengths=(20,)))
    options = {"svd_first": True, "lr": 1e-6, "tokens_per_step": 10**6, "calibration": text}
    hebbian = build_basis(small, method="lolora", rank=4, **options)
    exact = build_basis(small, method="eva", rank=4, calibration=text)

    for mine, pca in zip(hebbian.A, exact.A, strict=True):
        assert chordal(mine, pca) < 2e-2


def test_output_rules_are_what_they_say(small: BaseModel) -> None:
    W, g = random_matrix(20, 30), random_matrix(20, 30, seed=1)
    A, Y = orthonormal(30, 4, seed=2).T, random_matrix(20, 20, seed=3)
    Y = Y @ Y.T
    data = module_data(W, 4, gradient=g, outputs=Y)

    grad = output_space("grad", A, data)
    kept = grad.T @ g @ A.T
    for seed in range(200):
        other = orthonormal(20, 4, seed=seed)
        assert float((other.T @ g @ A.T).square().sum()) <= float(kept.square().sum())
    torch.testing.assert_close(float(kept.square().sum()), float((g @ A.T).square().sum()))
    wa = output_space("wa", A, data)
    torch.testing.assert_close(wa @ wa.T @ W @ A.T, W @ A.T)
    y = output_space("y", A, data)
    assert chordal(y.T, torch.linalg.eigh(Y)[1][:, -4:].T) < 1e-6
    for B in (grad, wa, y, output_space("random", A, data)):
        torch.testing.assert_close(B.T @ B, torch.eye(4).double(), rtol=0, atol=1e-10)
