"""LoRA-SB (methods catalogue SB1 to SB8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import pytest
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

from tessera.methods.bases import CalibrationSet, build_basis, build_basis_and_step
from tessera.methods.bases.lora_sb import add_noise, select, update_direction
from tessera.methods.building.collected import Needs
from tessera.methods.building.gradients import collect
from tessera.methods.building.losses import attached, mean_loss
from tessera.methods.building.rebasing import project
from tessera.methods.building.targets import find_targets
from tessera.methods.init import make_init
from tessera.methods.options import fill_options
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import (
    chordal,
    factorise,
    module_data,
    orthonormal,
    random_matrix,
    small_calibration,
    small_model,
    svd_rank,
)

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("s", [0.5, 1.0, 4.0])
def test_sb1_start_is_the_truncated_update(s: float) -> None:
    G, eta = random_matrix(20, 30), 3e-4
    found = factorise("lora_sb", module_data(torch.zeros(20, 30), 6, gradient=G))
    assert found.step is not None

    R0 = eta * found.step / s
    torch.testing.assert_close(s * found.B @ R0 @ found.A, svd_rank(-eta * G.sign(), 6), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.step, torch.diag(found.step.diagonal()))
    assert (found.step.diagonal() > 0).all(), "the sign is in the factors, not in R_0"


def test_sb1_sign_of_zero_is_zero_and_soft_sign_is_adams() -> None:
    G = torch.tensor([[2.0, -3e-8, 0.0]])

    assert update_direction(G).tolist() == [[-1.0, 1.0, 0.0]]
    torch.testing.assert_close(update_direction(G, soft_sign=1e-8), torch.tensor([[-1.0, 0.75, 0.0]]))


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_sb1_noise_is_added_to_the_update(noise: float) -> None:
    """Table 4: the SVD of ΔW + N(0, (noise η)²); the same noise for the same seed and module."""
    G = random_matrix(20, 30)
    data = module_data(torch.zeros(20, 30), 6, gradient=G)
    found, again, other = (factorise("lora_sb", data, noise=noise, seed=seed) for seed in (3, 3, 4))
    E = (found.B @ found.step @ found.A) if found.step is not None else torch.zeros(0)

    update = -G.sign()
    noisy = add_noise(update.clone(), "layer", {"noise": noise, "seed": 3})
    torch.testing.assert_close(E, svd_rank(noisy, 6), rtol=0, atol=1e-10)
    drawn = (noisy - update) / noise
    assert float(drawn.mean()) == pytest.approx(0, abs=0.15)
    assert float(drawn.std()) == pytest.approx(1, abs=0.1)
    assert torch.equal(found.A, again.A)
    assert chordal(found.A, other.A) > 0.1
    elsewhere = add_noise(update.clone(), "other layer", {"noise": noise, "seed": 3})
    assert not torch.allclose(elsewhere, noisy)


def test_sb1_a_projected_step_has_the_noise_of_its_basis(
    small: BaseModel, calibration: CalibrationSet
) -> None:
    options = {"noise": 1.0, "seed": 2}
    built = build_basis_and_step(small, method="lora_sb", rank=4, calibration=calibration, **options)
    start = {"eta_init": "value", "eta": 1e-3, **options}
    own = make_init(built.basis, method="sb_step", step=built.step, **start)
    projected = make_init(built.basis, method="sb_step", base=small, calibration=calibration, **start)

    torch.testing.assert_close(own, projected, rtol=0, atol=2e-3 * float(own.abs().max()))
    plain = make_init(
        built.basis, method="sb_step", base=small, calibration=calibration, eta_init="value", eta=1e-3
    )
    assert float((plain - own).abs().max()) > 0.01 * float(own.abs().max())


def test_sb2_the_sign_step_lowers_the_loss_as_predicted() -> None:
    base, calibration = small_model(dtype=torch.float64), small_calibration(4)
    built = build_basis_and_step(base, method="lora_sb", rank=6, calibration=calibration)
    targets = find_targets(base.model, LINEARS, 6)
    gradients = [s.g() / len(calibration) for s in collect(base, targets, calibration, Needs(gradient=True))]
    before = mean_loss(base, calibration)

    ratios = []
    for eta in (1e-4, 1e-6):
        core = built.basis.fold(
            make_init(built.basis, method="sb_step", step=built.step, eta_init="value", eta=eta)
        )
        predicted = sum(
            float((g * (built.basis.B[i].double() @ core[i].double() @ built.basis.A[i].double())).sum())
            for i, g in enumerate(gradients)
        )
        truncated = sum(float((g * svd_rank(g.sign(), 6)).sum()) for g in gradients)
        assert predicted < 0
        assert predicted == pytest.approx(-eta * truncated, rel=1e-4)
        with attached(base, built.basis, core.double()):
            ratios.append((mean_loss(base, calibration) - before) / predicted)
    assert ratios[1] == pytest.approx(1, abs=0.05)
    assert abs(ratios[1] - 1) < abs(ratios[0] - 1)


def test_sb3_preconditioned_gradient_is_the_least_squares_optimum() -> None:
    """Theorem 3: g_R / s² (BᵀB)^-1 (AAᵀ)^-1 minimises ‖s B X A - g‖ over X."""
    A, B, g, s = (
        random_matrix(4, 12, seed=1),
        random_matrix(10, 4, seed=2),
        random_matrix(10, 12, seed=3),
        1.6,
    )

    optimum = precondition(s * B.T @ g @ A.T, A, B, s)

    design = s * torch.kron(B, A.T.contiguous())
    best = torch.linalg.lstsq(design, g.reshape(-1, 1)).solution.reshape(4, 4)
    torch.testing.assert_close(optimum, best, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("optimiser", "is_independent"), [("sgd", True), ("adam", False)])
def test_sb4_scale_independence_is_a_statement_about_sgd(optimiser: str, is_independent: bool) -> None:
    """Theorem 5 holds for SGD. Under Adam the 1/s² cancels and ‖ΔW‖ grows with s, so it fixes s = 1."""
    deltas = [preconditioned_training(optimiser, s) for s in (0.5, 1.0, 4.0)]

    if is_independent:
        for delta in deltas[1:]:
            torch.testing.assert_close(delta, deltas[0], rtol=1e-10, atol=1e-12)
    else:
        norms = [float(torch.linalg.matrix_norm(delta)) for delta in deltas]
        assert norms[0] < 0.8 * norms[1] < 0.64 * norms[2]


def test_sb4_theorem_3_is_sgd_in_the_orthonormal_basis() -> None:
    A, B = random_matrix(4, 12, seed=3), random_matrix(10, 4, seed=4)
    delta = preconditioned_training("sgd", 1.0)
    Q_A, Q_B = torch.linalg.qr(A.T)[0].T, torch.linalg.qr(B)[0]

    torch.testing.assert_close(
        preconditioned_training("sgd", 1.0, A=Q_A, B=Q_B), delta, rtol=1e-10, atol=1e-12
    )


def test_sb_table_3_counts_the_ffn_output() -> None:
    """RoBERTa-large, table 3: LoRA r = 8 has 2162.69 K numbers, LoRA-SB 6.14 K and 24.57 K at r = 8 and 16.

    The four modules per layer are those of the authors' code. Query, key, value and attention output, as the
    text of section 3.3 has it, would give LoRA 1572.86 K.
    """
    config = RobertaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    )
    with torch.device("meta"):
        model = RobertaModel(config)
    shapes = {
        name: module.weight.shape for name, module in model.encoder.named_modules() if is_linear(module)
    }

    def chosen(*suffixes: str) -> list[torch.Size]:
        return [
            shape
            for name, shape in shapes.items()
            if any(name.partition(".")[2].partition(".")[2] == suffix for suffix in suffixes)
        ]

    code = chosen("attention.self.query", "attention.self.value", "attention.output.dense", "output.dense")
    text = chosen(
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
    )
    assert len(code) == len(text) == 96
    assert sum(8 * (d_out + d_in) for d_out, d_in in code) == 2_162_688
    assert sum(8 * (d_out + d_in) for d_out, d_in in text) == 1_572_864
    assert [len(code) * r**2 for r in (8, 16, 24)] == [6_144, 24_576, 55_296]


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear)


def precondition(g_R: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return torch.linalg.inv(B.T @ B) @ g_R @ torch.linalg.inv(A @ A.T) / s**2


def preconditioned_training(
    optimiser: str, s: float, *, A: Tensor | None = None, B: Tensor | None = None
) -> Tensor:
    """ΔW after ten steps of least squares with the gradient of theorem 3."""
    A = random_matrix(4, 12, seed=3) if A is None else A
    B = random_matrix(10, 4, seed=4) if B is None else B
    x, target = random_matrix(30, 12, seed=11), random_matrix(30, 10, seed=12)
    R = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD if optimiser == "sgd" else torch.optim.Adam
    step = make([R], lr=1e-3)
    for _ in range(10):
        step.zero_grad()
        (x @ (s * B @ R @ A).T - target).square().mean().backward()
        assert R.grad is not None
        R.grad = precondition(R.grad, A, B, s)
        step.step()
    return s * B @ R.detach() @ A


def test_sb5_a_small_preconditioned_step_lowers_the_loss_of_its_batch() -> None:
    """Theorem 4, on a whole model: M ← M - η Bᵀ g Aᵀ in the orthonormal basis."""
    base, calibration = small_model(dtype=torch.float64), small_calibration(4)
    before = mean_loss(base, calibration)
    for method in ("random", "lora_xs", "lora_sb"):
        basis = build_basis(base, method=method, rank=4, calibration=calibration)
        targets = find_targets(base.model, LINEARS, 4)
        statistics = collect(base, targets, calibration, Needs(gradient=True))
        core = torch.stack([-1e-4 * project(s.g(), basis, i) for i, s in enumerate(statistics)])
        with attached(base, basis, core):
            assert mean_loss(base, calibration) < before


def test_sb6_grouped_gradients_equal_plain_ones(small: BaseModel, calibration: CalibrationSet) -> None:
    """One pass for all layers, one pass per layer, and backward() on the weights themselves."""
    targets = find_targets(small.model, LINEARS, 1)
    needs = Needs(gradient=True)
    at_once = [s.g() for s in collect(small, targets, calibration, needs)]
    halves = [
        *collect(small, targets[:7], calibration, needs),
        *collect(small, targets[7:], calibration, needs),
    ]

    copy = small_model()
    weights = [copy.model.get_submodule(target.name).weight.requires_grad_() for target in targets]
    for token_ids, mask in calibration.examples:
        ids = torch.tensor([token_ids])
        labels = torch.where(torch.tensor([mask]), ids, -100)
        copy.model(input_ids=ids, labels=labels).loss.backward()
    for grouped, half, weight in zip(at_once, halves, weights, strict=True):
        assert weight.grad is not None
        scale = float(weight.grad.abs().max())
        torch.testing.assert_close(grouped / scale, weight.grad / scale, rtol=0, atol=1e-5)
        torch.testing.assert_close(grouped / scale, half.g() / scale, rtol=0, atol=1e-6)


def test_sb7_bfloat16_sums_agree_in_sign() -> None:
    """The authors sum in bfloat16. Printed: the share of signs on which it agrees with float32."""
    base, calibration = small_model(), small_calibration(24)
    targets = find_targets(base.model, LINEARS, 1)
    parts = [CalibrationSet((example,)) for example in calibration.examples]
    per_example = [collect(base, targets, part, Needs(gradient=True)) for part in parts]

    agreed = total = 0
    for index in range(len(targets)):
        exact = torch.zeros_like(per_example[0][index].g())
        rounded = exact.to(torch.bfloat16)
        for statistics in per_example:
            exact += statistics[index].g()
            rounded += statistics[index].g().to(torch.bfloat16)
        agreed += int((exact.sign() == rounded.sign()).sum())
        total += exact.numel()
    assert agreed / total > 0.99, f"{agreed / total:.4f} of the signs agree"


def test_sb8_user_start_is_the_least_squares_optimum(small: BaseModel, calibration: CalibrationSet) -> None:
    """R_0 of a user in a shared basis with a preconditioner and a scale minimises ‖s B' R A' - ΔW_u‖."""
    basis = build_basis(small, method="lora_xs", rank=4, scale=0.7)
    user, eta = small_calibration(5, seed=9), 1e-3

    R0 = make_init(basis, method="sb_step", base=small, calibration=user, eta_init="value", eta=eta).double()

    targets = find_targets(small.model, LINEARS, 4)
    statistics = collect(small, targets, user, Needs(gradient=True))
    for index in (0, 3, 6, 13):
        wanted = -eta * statistics[index].g().double().sign()
        A = basis.P_in[index].double() @ basis.A[index].double()
        B = basis.B[index].double() @ basis.P_out[index].double()
        design = torch.kron(B, A.T.contiguous())
        best = torch.linalg.lstsq(design, wanted.reshape(-1, 1)).solution.reshape(4, 4)
        torch.testing.assert_close(R0[index], best, rtol=1e-3, atol=1e-6 * float(best.abs().max()) * 1e3)


def test_sb8_projection_is_exact_in_double_precision() -> None:
    from tests.tessera.methods.bases.test_generic import make

    basis, wanted = make("0"), random_matrix(10, 12, seed=8)
    design = torch.kron(basis.B[0].double(), basis.A[0].double().T.contiguous())
    best = torch.linalg.lstsq(design, wanted.reshape(-1, 1)).solution.reshape(4, 4)

    torch.testing.assert_close(project(wanted, basis, 0), best, rtol=1e-10, atol=1e-10)


def test_sb8_in_its_own_basis_the_projection_is_the_papers_start(
    small: BaseModel, calibration: CalibrationSet
) -> None:
    built = build_basis_and_step(small, method="lora_sb", rank=4, calibration=calibration, scale=2.0)
    options = {
        "eta_init": "first_warmup_step",
        "learning_rate": 1e-3,
        "warmup_ratio": 0.02,
        "total_steps": 1000,
    }

    papers = make_init(built.basis, method="sb_step", step=built.step, **options)
    projected = make_init(built.basis, method="sb_step", base=small, calibration=calibration, **options)

    torch.testing.assert_close(papers, projected, rtol=1e-4, atol=1e-7)
    assert built.step is not None
    torch.testing.assert_close(papers, 1e-3 / 20 * built.step, rtol=1e-5, atol=0)


def test_sb_takes_a_share_of_the_data_with_a_floor_of_tokens() -> None:
    data = small_calibration(100)
    from tessera.methods.bases import METHODS

    def chosen(**options: object) -> CalibrationSet:
        return select(data, fill_options("lora_sb", METHODS["lora_sb"].options, options))

    assert len(chosen()) == 100, "the default floor is more than there is"
    floor = chosen(min_label_tokens=50)
    assert 50 <= floor.num_label_tokens < 50 + 14
    assert len(chosen(share=0.3, min_label_tokens=0)) == 30
    assert len(chosen(num_examples=7)) == 7
    assert (
        chosen(num_examples=7).digest
        == chosen(num_examples=7).digest
        != chosen(num_examples=7, seed=1).digest
    )


def test_sb_basis_of_the_sign_is_orthonormal_and_unscaled() -> None:
    found = factorise("lora_sb", module_data(torch.zeros(20, 30), 6, gradient=random_matrix(20, 30)))

    torch.testing.assert_close(found.A @ found.A.T, torch.eye(6).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.B.T @ found.B, torch.eye(6).double(), rtol=0, atol=1e-12)
    assert orthonormal(20, 6).shape == found.B.shape
