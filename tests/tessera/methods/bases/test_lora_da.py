"""LoRA-DA (methods catalogue DA1 to DA8)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tessera.methods.algebra.lora_da_guidance import guidance, invert_fisher
from tessera.methods.bases import CalibrationSet
from tessera.methods.building.activations import SecondMoment
from tessera.methods.building.collected import Counts, Needs
from tessera.methods.building.decomposition import eigh_bytes, smallest_eigenvectors
from tessera.methods.building.gradients import collect
from tessera.methods.building.targets import find_targets
from tessera.model.base_model import BaseModel
from tests.tessera.methods.da_module import D_IN, D_OUT, RANK, da, fisher_of, make_data
from tests.tessera.methods.matrices import chordal, factorise, orthonormal, random_matrix, svd_rank


def test_da1_the_subspace_minimises_the_guidance() -> None:
    data = make_data()
    fisher = fisher_of(data)
    delta = fisher.natural_step(data.statistics.g() / 10)
    omega = guidance(fisher, delta, variance=fisher.output_trace / 400)

    A = da(data).A.double()

    torch.testing.assert_close(A @ A.T, torch.eye(RANK).double(), rtol=0, atol=1e-10)
    value = float((A @ omega @ A.T).trace())
    smallest = float(torch.linalg.eigvalsh(omega)[:RANK].sum())
    assert value == pytest.approx(smallest, rel=1e-8)
    for seed in range(2000):
        other = orthonormal(D_IN, RANK, seed=seed).T
        assert float((other @ omega @ other.T).trace()) >= value


def test_da2_without_variance_and_fisher_it_is_the_gradients_svd() -> None:
    """Remark 4.3 and eq. 22: argmin tr(-A gᵀg Aᵀ) is the top right singular space of g."""
    data = make_data()
    found = da(data, use_variance=False, use_fisher=False)

    Vh = torch.linalg.svd(data.statistics.g())[2][:RANK]
    torch.testing.assert_close(found.A.T @ found.A, Vh.T @ Vh, rtol=0, atol=1e-10)
    assert found.step is not None
    torch.testing.assert_close(found.B @ found.step @ found.A, -svd_rank(data.statistics.g() / 10, RANK))


def test_da3_lemma_c1_bounds_the_variance() -> None:
    """(AᵀJA)^-1 ⪯ AᵀJ^-1A for orthonormal A, with equality where the span of A is invariant under J."""
    for seed in range(20):
        X = random_matrix(12, 12, seed=seed)
        J = X @ X.T + 0.1 * torch.eye(12)
        A = orthonormal(12, 4, seed=seed + 100)
        gap = A.T @ torch.linalg.inv(J) @ A - torch.linalg.inv(A.T @ J @ A)
        assert float(torch.linalg.eigvalsh((gap + gap.T) / 2).min()) >= -1e-12
        invariant = torch.linalg.eigh(J)[1][:, 3:7]
        left = invariant.T @ torch.linalg.inv(J) @ invariant
        torch.testing.assert_close(left, torch.linalg.inv(invariant.T @ J @ invariant), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["core", "frozen_a"])
def test_da4_the_residual_is_orthogonal_to_the_input_space(form: str) -> None:
    """B_0 = Δ Aᵀ, so (Δ - B A) Aᵀ = 0, whatever the form in which B_0 is kept (eq. 17)."""
    data = make_data()
    found = da(data, form=form)
    delta = fisher_of(data).natural_step(data.statistics.g() / 10)

    assert found.step is not None
    product = found.B @ found.step.double() @ found.A
    torch.testing.assert_close(product, delta @ found.A.T @ found.A, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        (delta - product) @ found.A.T, torch.zeros(D_OUT, RANK).double(), rtol=0, atol=1e-10
    )
    gram = found.B.T @ found.B
    assert torch.allclose(gram, torch.eye(RANK).double(), atol=1e-10) is (form == "core")


def test_da5_kfac_is_the_fisher_of_independent_factors() -> None:
    """For x and δ independent, E[vec(δᵀx) vec(δᵀx)ᵀ] = Y ⊗ Z (rows of W one after another), within 3/√N."""
    N = 40_000
    x = random_matrix(N, 4, seed=1) @ random_matrix(4, 4, seed=2)
    delta = random_matrix(N, 3, seed=3) @ random_matrix(3, 3, seed=4)
    Z, Y = x.T @ x / N, delta.T @ delta / N
    vec = (delta[:, :, None] * x[:, None, :]).flatten(1)
    J = vec.T @ vec / N

    product = torch.kron(Y, Z)
    assert (
        float(torch.linalg.matrix_norm(J - product) / torch.linalg.matrix_norm(product))
        < 3 / math.sqrt(N) * 4
    )
    inverse = torch.linalg.inv(product).reshape(3, 4, 3, 4)
    for i in range(3):
        block = torch.linalg.inv(Y)[i, i] * torch.linalg.inv(Z)
        torch.testing.assert_close(inverse[i, :, i, :], block, rtol=1e-8, atol=1e-8)


def test_da5_units_make_kfac_the_information_of_one_token(small: BaseModel) -> None:
    """Y of examples with T tokens to learn is in units of the log-likelihood.

    The same data with the losses' mean over T instead (the authors' units) is smaller by T² times the ratio
    of all tokens to those to learn.
    """
    examples = [
        (tuple(range(5, 25)), (False,) * 10 + (True,) * 10),
        (tuple(range(30, 50)), (False,) * 10 + (True,) * 10),
    ]
    calibration = CalibrationSet(tuple(examples))
    targets = find_targets(small.model, ["o_proj"], 1)
    token = collect(small, targets, calibration, Needs(outputs="diagonal"))
    loss = collect(small, targets, calibration, Needs(outputs="diagonal", output_units="loss"))
    full = collect(small, targets, calibration, Needs(outputs="full"))

    for mine, theirs, matrix in zip(token, loss, full, strict=True):
        torch.testing.assert_close(mine.Y(), theirs.Y() * 10**2 * 40 / 20, rtol=1e-5, atol=0)
        torch.testing.assert_close(mine.Y(), matrix.Y().diagonal(), rtol=1e-5, atol=0)


def test_da5_statistics_equal_a_plain_computation(small: BaseModel, calibration: CalibrationSet) -> None:
    targets = find_targets(small.model, ["down_proj", "q_proj", "k_proj"], 1)
    needs = Needs(gradient=True, inputs=lambda name, width: SecondMoment(width), outputs="diagonal")
    found = collect(small, targets, calibration, needs)

    inputs: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    handles = [
        target.linear.register_forward_hook(lambda m, args, out, n=target.name: inputs[n].append(args[0][0]))
        for target in targets
    ]
    for token_ids, _ in calibration.examples:
        small.model(input_ids=torch.tensor([token_ids]))
    for handle in handles:
        handle.remove()
    for target, statistics in zip(targets, found, strict=True):
        x = torch.cat(inputs[target.name]).double()
        rule = statistics.inputs
        assert isinstance(rule, SecondMoment)
        assert rule.num_tokens == len(x) == calibration.num_tokens
        torch.testing.assert_close(rule.moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rule.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    by_name = {target.name: statistics.inputs for target, statistics in zip(targets, found, strict=True)}
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        assert by_name[f"{layer}.q_proj"] is by_name[f"{layer}.k_proj"], "one Z per distinct input"
    assert len({id(rule) for rule in by_name.values()}) == 4


def test_da6_much_variance_gives_the_principal_components() -> None:
    """Variance weight → ∞: the bottom eigenvectors of Z^-1, the top principal components of the inputs."""
    data = make_data()
    rule = data.statistics.inputs
    assert isinstance(rule, SecondMoment)
    top = torch.linalg.eigh(rule.moment)[1][:, -RANK:].T

    for options in (
        {"variance_weight": 1e12},
        {"population": 1, "variance_weight": 1e9},
        {"use_bias": False},
    ):
        A = da(data, **options).A
        torch.testing.assert_close(A.T @ A, top.T @ top, rtol=0, atol=1e-6)
    assert chordal(da(data, use_variance=False).A, top) > 0.5
    weights = (0.0, 1e2, 1e4, 1e6)
    distances = [chordal(da(data, variance_weight=weight).A, top) for weight in weights]
    assert distances == sorted(distances, reverse=True), "it interpolates between gradient and inputs"


def test_da7_lobpcg_finds_the_eigenvectors() -> None:
    Q = orthonormal(200, 200)
    omega = Q * -(torch.arange(1, 201, dtype=torch.float64) ** -1.0) @ Q.T
    exact = smallest_eigenvectors(omega, 8, solver="eigh")
    found = smallest_eigenvectors(
        omega, 8, solver="lobpcg", num_iterations=100, generator=torch.Generator().manual_seed(0)
    )

    assert chordal(exact.T, found.T) < 1e-3
    torch.testing.assert_close(found.T @ found, torch.eye(8).double(), rtol=0, atol=1e-8)
    data = make_data()
    by_lobpcg = factorise("lora_da", data, solver="lobpcg", num_iterations=200)
    assert chordal(by_lobpcg.A, da(data).A) < 1e-3


@pytest.mark.parametrize("num_tokens", [100, 10**6])
def test_da7_beyond_the_width_where_all_eigenvectors_are_found(num_tokens: int) -> None:
    """LOBPCG, the default there: with much variance, and with hardly any."""
    width = 1040
    x = random_matrix(2500, width, seed=1) * torch.linspace(2, 0.1, width, dtype=torch.float64)
    Y = random_matrix(400, 60, seed=3).square().mean(0) * torch.linspace(1, 0.05, 60)
    g = random_matrix(60, 8, seed=4) @ random_matrix(8, width, seed=5) + 0.1 * random_matrix(60, width)
    fisher = invert_fisher(x.T @ x / 2500, Y, damping=1e-3, is_relative=True, name="layer")
    delta = fisher.natural_step(g)
    omega = guidance(fisher, delta, variance=fisher.output_trace / num_tokens)

    found = smallest_eigenvectors(omega, 8, solver="lobpcg")

    assert chordal(found.T, smallest_eigenvectors(omega, 8, solver="eigh").T) < 1e-3


def clustered(side: int, *, gap: float) -> Tensor:
    """Ω with 24 negative eigenvalues that differ by `gap` of themselves, the rest far above."""
    low = -1 - gap * torch.arange(24, dtype=torch.float64).flip(0)
    Q = orthonormal(side, side)
    return Q * torch.cat([low, torch.linspace(0, 1e3, side - 24, dtype=torch.float64)]) @ Q.T


def test_da7_clusters_are_told_apart_by_default() -> None:
    """Eigenvalues 0.2 % apart: 40 iterations of LOBPCG find others of about the same worth."""
    omega = clustered(200, gap=2e-3)
    exact = torch.linalg.eigh(omega)[1][:, :16]

    assert chordal(smallest_eigenvectors(omega, 16).T, exact.T) < 1e-6
    few = smallest_eigenvectors(omega, 16, solver="lobpcg", num_iterations=40)
    assert chordal(few.T, exact.T) > 0.3
    assert float((few.T @ omega @ few).trace()) < 0.95 * float((exact.T @ omega @ exact).trace())


def test_da7_without_room_for_all_eigenvectors_a_few_are_found() -> None:
    """Whatever the memory, the same space; with a limit the matrix is overwritten."""
    omega = clustered(200, gap=0.2)
    exact = torch.linalg.eigh(omega)[1][:, :8]
    room = eigh_bytes(omega)
    for limit in (room, room - 1, -1):
        found = smallest_eigenvectors(omega.clone(), 8, num_iterations=400, limit_bytes=limit)
        assert chordal(found.T, exact.T) < 1e-3, limit
    for limit in (None, room):
        kept = omega.clone()
        smallest_eigenvectors(kept, 8, limit_bytes=limit)
        assert torch.equal(kept, omega) is (limit is None)


def test_da7_scaling_the_step_and_n_together_changes_nothing() -> None:
    data = make_data()
    fisher = fisher_of(data)
    delta = fisher.natural_step(data.statistics.g() / 10)
    spaces = []
    for c in (1.0, 37.0):
        omega = guidance(fisher, c * delta, variance=fisher.output_trace / (400 / c**2))
        spaces.append(smallest_eigenvectors(omega, RANK, solver="eigh"))

    torch.testing.assert_close(spaces[0] @ spaces[0].T, spaces[1] @ spaces[1].T, rtol=0, atol=1e-8)
    plain, normalised = da(data), da(data, normalise=True)
    assert chordal(plain.A, normalised.A) < 1e-6
    assert plain.step is not None
    assert normalised.step is not None
    sigma = plain.notes["sigma_max"]
    torch.testing.assert_close(
        plain.B @ plain.step @ plain.A, sigma * normalised.B @ normalised.step @ normalised.A
    )


def test_da8_repo_mode_numbers() -> None:
    """Absolute damping 1e-6, variance 0.03 / (N σ²), Δ / σ, B A / γ γ = 1024: ‖B_0 A_0‖₂ ≤ 1/γ before s."""
    data = make_data(counts=Counts(10, 500, 400, 100_000, 400))
    found = da(data, mode="repo")
    rule = data.statistics.inputs
    assert isinstance(rule, SecondMoment)
    Z = rule.moment + 1e-6 * torch.eye(D_IN)
    D = 1 / (data.statistics.Y() + 1e-6)
    delta = -D[:, None] * (data.statistics.g() / 10) @ torch.linalg.inv(Z)
    sigma = float(torch.linalg.matrix_norm(delta, ord=2))
    omega = 0.03 * D.sum() / (100_000 * sigma**2) * torch.linalg.inv(Z) - delta.T @ delta / sigma**2
    expected = torch.linalg.eigh(omega)[1][:, :RANK].T

    assert chordal(found.A, expected) < 1e-6
    assert found.notes["sigma_max"] == pytest.approx(sigma, rel=1e-6)
    assert found.step is not None
    start = found.B @ (found.step / 1024) @ found.A
    assert float(torch.linalg.matrix_norm(start, ord=2)) <= 1 / 1024 * (1 + 1e-9)
    torch.testing.assert_close(start, delta / sigma @ expected.T @ expected / 1024, rtol=1e-6, atol=1e-12)


def test_da8_repo_damping_flattens_the_output_side(tiny: BaseModel, tiny_examples: CalibrationSet) -> None:
    """The authors' Y falls with the square of an answer's length and meets an absolute damping of 1e-6.

    With answers of 50 tokens the bundled model's medians are 2e-7 to 1e-3 (in the last layer 2e-7 to 1e-6),
    and D loses most of its differences where they are below it.
    """
    targets = find_targets(tiny.model, [f"model.layers.5.*.{kind}_proj" for kind in ("q", "gate", "up")], 1)
    loss = collect(tiny, targets, tiny_examples, Needs(outputs="diagonal", output_units="loss"))
    token = collect(tiny, targets, tiny_examples, Needs(outputs="diagonal"))
    for theirs, ours in zip(loss, token, strict=True):
        absolute = 1 / (theirs.Y() + 1e-6)
        relative = 1 / (ours.Y() + 1e-3 * ours.Y().median())
        assert float(absolute.std() / absolute.mean()) < 0.6 * float(relative.std() / relative.mean())
