"""The papers' baselines (methods catalogue B1 to B6, OLoRA's part of B7)."""

from __future__ import annotations

import pytest
import torch

from tessera.errors import InvalidInput
from tessera.methods.bases import CalibrationSet, build_basis, build_basis_and_step
from tessera.methods.bases.corda import damped_inverse
from tessera.methods.bases.lora_ga import lora_form, stable_scale
from tessera.methods.building.activations import ScaledMoment, SecondMoment
from tessera.methods.building.collected import Needs
from tessera.methods.building.decomposition import Decomposition, spectral_norm
from tessera.methods.building.gradients import collect
from tessera.methods.building.targets import find_targets
from tessera.methods.init import make_init
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import (
    chordal,
    decaying_matrix,
    factorise,
    module_data,
    random_matrix,
    svd_rank,
    text_of,
)


def test_b1_pissa_splits_the_principal_part() -> None:
    W = decaying_matrix(20, 30)
    found = factorise("pissa", module_data(W, 6))

    torch.testing.assert_close(found.B @ found.A, svd_rank(W, 6), rtol=0, atol=1e-10)
    values = torch.linalg.svdvals(W)[:6]
    torch.testing.assert_close(found.A @ found.A.T, torch.diag(values), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.B.T @ found.B, torch.diag(values), rtol=0, atol=1e-10)
    torch.testing.assert_close(W - found.B @ found.A + found.B @ found.A, W, rtol=0, atol=1e-6)


def test_b1_pissa_serves_the_basis_of_lora_xs(small: BaseModel) -> None:
    pissa, xs = build_basis(small, method="pissa", rank=4), build_basis(small, method="lora_xs", rank=4)

    for i in range(pissa.num_modules):
        torch.testing.assert_close(pissa.A[i], xs.A[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(pissa.B[i], xs.B[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(pissa.P_in[i].square(), xs.P_in[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pissa.P_out[i], pissa.P_in[i], rtol=1e-4, atol=1e-5)


def test_b1_randomised_svd_loses_little() -> None:
    """The authors' fast SVD takes q = r; ours oversamples: its excess over the optimum is far smaller."""
    W = decaying_matrix(200, 300, power=0.3)
    best = float(torch.linalg.matrix_norm(W - svd_rank(W, 8)))
    U, S, Vh = Decomposition("randomised").svd(W, 8, seed=0)
    ours = float(torch.linalg.matrix_norm(W - (U[:, :8] * S[:8] @ Vh[:8]).double()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(W, q=8, niter=1)
    theirs = float(torch.linalg.matrix_norm(W - U * S @ V.T))

    assert best <= ours < best * 1.001
    assert ours - best < 0.1 * (theirs - best)


def test_b1_milora_takes_the_minor_part() -> None:
    W = decaying_matrix(20, 30)
    found = factorise("milora", module_data(W, 6))

    torch.testing.assert_close(found.B @ found.A, W - svd_rank(W, 14), rtol=0, atol=1e-10)
    top = factorise("milora", module_data(W, 6), vectors="top")
    torch.testing.assert_close(top.B @ top.A, svd_rank(W, 6), rtol=0, atol=1e-10)


def test_b2_lora_gas_first_step_needs_both_factors_trained() -> None:
    """ArB2r: one step of both factors moves B A along the rank-2r part of g. Frozen, it is blind."""
    g, eta = random_matrix(20, 30), 1e-7
    A, B = lora_form(g, 4, gamma=16.0)
    moved_A, moved_B = A - eta * B.T @ g, B - eta * g @ A.T

    step = (moved_B @ moved_A - B @ A) / -eta
    c = stable_scale(20, 16.0)
    torch.testing.assert_close(step, c**2 * svd_rank(g, 8), rtol=0, atol=1e-4)
    torch.testing.assert_close(B.T @ g @ A.T, torch.zeros(4, 4).double(), rtol=0, atol=1e-10)
    with pytest.raises(InvalidInput, match="at most 10"):
        lora_form(g, 11)


def test_b2_the_frozen_form_uses_the_same_vectors_on_both_sides() -> None:
    g = random_matrix(20, 30)
    found = factorise("lora_ga", module_data(torch.zeros(20, 30), 4, gradient=g))

    c = stable_scale(20, 16.0)
    values = torch.linalg.svdvals(g)[:4]
    torch.testing.assert_close(found.B.T @ g @ found.A.T, c**2 * torch.diag(values), rtol=0, atol=1e-10)


def test_b2_the_blind_form_is_refused(small: BaseModel, calibration: CalibrationSet) -> None:
    with pytest.raises(InvalidInput, match="without a gradient") as caught:
        build_basis(small, method="lora_ga", rank=4, calibration=calibration, direction="ArB2r")
    assert caught.value.param == "direction"


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_b3_lora_one_starts_against_the_gradient(
    small: BaseModel, calibration: CalibrationSet, scale: float
) -> None:
    """ΔW_0 = B R_0 A is -g_r scaled to the largest singular value 1/γ."""
    built = build_basis_and_step(small, method="lora_one", rank=4, calibration=calibration, scale=scale)
    start = {"method": "gradient", "eta_init": "value", "eta": 1 / 128, "normalise": "spectral"}
    own = make_init(built.basis, step=built.step, **start)
    projected = make_init(built.basis, base=small, calibration=calibration, **start)
    torch.testing.assert_close(own, projected, rtol=1e-3, atol=1e-6)

    served = built.basis.fold(own.double())
    targets = find_targets(small.model, ("q_proj", "down_proj"), 4)
    gradients = collect(small, targets, calibration, Needs(gradient=True))
    names = [module.name for module in built.basis.manifest.modules]
    for target, statistics in zip(targets, gradients, strict=True):
        i = names.index(target.name)
        delta = built.basis.B[i].double() @ served[i] @ built.basis.A[i].double()
        g = statistics.g().double()
        torch.testing.assert_close(delta, -svd_rank(g, 4) / spectral_norm(g) / 128, rtol=0, atol=1e-7)
        assert float(torch.linalg.matrix_norm(delta, ord=2)) == pytest.approx(1 / 128, rel=1e-5)


def test_b4_eva_is_the_pca_of_all_inputs(small: BaseModel, calibration: CalibrationSet) -> None:
    text = text_of(calibration)
    basis = build_basis(small, method="eva", rank=4, calibration=text)

    names = [module.name for module in basis.manifest.modules]
    targets = find_targets(small.model, ("q_proj", "down_proj"), 4)
    inputs: dict[str, list[torch.Tensor]] = {target.name: [] for target in targets}
    handles = [
        target.linear.register_forward_hook(lambda m, args, out, n=target.name: inputs[n].append(args[0][0]))
        for target in targets
    ]
    for token_ids, _ in calibration.examples:
        small.model(input_ids=torch.tensor([token_ids]))
    for handle in handles:
        handle.remove()
    for target in targets:
        x = torch.cat(inputs[target.name]).double()
        Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
        assert chordal(basis.A[names.index(target.name)], Vh) < 1e-3
    for layer in (0, 1):
        q, k, v = (names.index(f"model.layers.{layer}.self_attn.{kind}_proj") for kind in "qkv")
        assert torch.equal(basis.A[q], basis.A[k])
        assert torch.equal(basis.A[q], basis.A[v])
        assert not torch.equal(basis.B[k], basis.B[v])


def test_b4_covariance_survives_a_large_mean() -> None:
    x = random_matrix(1000, 8, dtype=torch.float32) + 3000
    rule = SecondMoment(8)
    for part in x.split(100):
        rule.observe(part, [100])

    exact = x.double() - x.double().mean(0)
    torch.testing.assert_close(rule.covariance, exact.T @ exact / 1000, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rule.mean, x.double().mean(0), rtol=1e-9, atol=0)


def test_b5_corda_at_full_rank_gives_the_weight_back() -> None:
    W = decaying_matrix(12, 16)
    rule = ScaledMoment(16)
    rule.observe(random_matrix(60, 16, seed=3), [20, 40])
    found = factorise("corda", module_data(W, 12, inputs=rule))

    torch.testing.assert_close(found.B @ found.A, W, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("mode", "part"), [("ipm", slice(0, 4)), ("kpm", slice(8, 12))])
def test_b5_corda_takes_first_or_last_directions(mode: str, part: slice) -> None:
    W = decaying_matrix(12, 16)
    rule = ScaledMoment(16)
    rule.observe(random_matrix(60, 16, seed=3), [20, 40])
    found = factorise("corda", module_data(W, 4, inputs=rule), mode=mode)

    C, inverse = damped_inverse(rule.moment, "layer")
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    expected = U[:, part] * S[part] @ Vh[part] @ inverse
    torch.testing.assert_close(found.B @ found.A, expected, rtol=0, atol=1e-8)


def test_b6_lora_pro_is_the_projection_of_the_gradient() -> None:
    """LoRA-Pro's equivalent gradient s B g_A + s g_B A is P_B g + g P_A - P_B g P_A, whatever X is.

    It needs A and B trained, so it is not offered; in the r × r form its idea is an orthonormal basis (F5).
    """
    A, B, g, s = (
        random_matrix(4, 12, seed=1),
        random_matrix(10, 4, seed=2),
        random_matrix(10, 12, seed=3),
        1.4,
    )
    grad_A, grad_B = s * B.T @ g, s * g @ A.T
    BB, AA = torch.linalg.inv(B.T @ B), torch.linalg.inv(A @ A.T)
    P_B, P_A = B @ BB @ B.T, A.T @ AA @ A
    expected = P_B @ g + g @ P_A - P_B @ g @ P_A

    for X in (torch.zeros(4, 4).double(), random_matrix(4, 4, seed=4)):
        g_A = BB @ grad_A / s**2 + X @ A
        g_B = (torch.eye(10) - P_B) @ grad_B @ AA / s**2 - B @ X
        torch.testing.assert_close(s * B @ g_A + s * g_B @ A, expected, rtol=0, atol=1e-8)


def test_b7_olora_is_a_qr_factorisation() -> None:
    for W in (decaying_matrix(20, 30), decaying_matrix(30, 20)):
        found = factorise("olora", module_data(W, 6))
        torch.testing.assert_close(found.B.T @ found.B, torch.eye(6).double(), rtol=0, atol=1e-10)
        torch.testing.assert_close(found.B @ found.A[:, :6], W[:, :6], rtol=0, atol=1e-10)
        assert (found.A.diagonal() > 0).all()
        full = factorise("olora", module_data(W, 20))
        torch.testing.assert_close(full.B @ full.A, W, rtol=0, atol=1e-10)


def test_gradient_svd_is_the_best_basis_for_one_step_of_sgd() -> None:
    """LoRA-SB's theorem 6, which holds for the gradient and not for its sign."""
    g = random_matrix(20, 30)
    found = factorise("gradient_svd", module_data(torch.zeros(20, 30), 4, gradient=g))

    torch.testing.assert_close(found.B @ found.B.T @ g @ found.A.T @ found.A, svd_rank(g, 4))
    assert found.step is not None
    torch.testing.assert_close(found.B @ found.step @ found.A, -svd_rank(g, 4))


def test_random_factors_differ_by_module_and_seed(small: BaseModel) -> None:
    one, two = (
        build_basis(small, method="random", rank=4),
        build_basis(small, method="random", rank=4, seed=1),
    )

    assert one.basis_id != two.basis_id
    for i in range(1, one.num_modules):
        assert one.A[i].shape != one.A[0].shape or not torch.equal(one.A[i], one.A[0])
