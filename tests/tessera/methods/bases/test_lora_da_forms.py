"""LoRA-DA's forms, its ablations and its start (beside the catalogue's DA1 to DA8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tessera.errors import InvalidInput
from tessera.methods.algebra.lora_da_guidance import two_sided, two_sided_bound
from tessera.methods.bases import METHODS, CalibrationSet, build_basis, build_basis_and_step
from tessera.methods.bases.lora_da import module_step
from tessera.methods.building.activations import SecondMoment
from tessera.methods.building.collected import Counts
from tessera.methods.building.decomposition import spectral_norm
from tessera.methods.building.method import ModuleData
from tessera.methods.init import make_init
from tessera.methods.options import fill_options
from tessera.model.base_model import BaseModel
from tests.tessera.methods.da_module import COUNTS, D_IN, D_OUT, RANK, da, fisher_of, make_data
from tests.tessera.methods.matrices import chordal, orthonormal, random_matrix


def test_da_two_sided_minimises_its_bound() -> None:
    data = make_data(full=True)
    fisher = fisher_of(data)
    delta = fisher.natural_step(data.statistics.g() / 10)

    no_variance = two_sided(fisher, delta, RANK, inverse_n=0.0)
    U, _, Vh = torch.linalg.svd(delta)
    assert chordal(no_variance[0], Vh[:RANK]) < 1e-6
    assert chordal(no_variance[1].T, U[:, :RANK].T) < 1e-6

    inverse_n = 0.1 * float(delta.square().sum()) / (float(fisher.Z_inv.trace()) * fisher.output_trace) * 30
    A, B = two_sided(fisher, delta, RANK, inverse_n=inverse_n)
    reached = two_sided_bound(fisher, delta, A, B, inverse_n=inverse_n)
    assert reached < two_sided_bound(fisher, delta, Vh[:RANK], U[:, :RANK], inverse_n=inverse_n)
    for seed in range(200):
        near_A = torch.linalg.qr(A.T + 0.02 * random_matrix(D_IN, RANK, seed=seed))[0].T
        near_B = torch.linalg.qr(B + 0.02 * random_matrix(D_OUT, RANK, seed=seed + 500))[0]
        assert two_sided_bound(fisher, delta, near_A, near_B, inverse_n=inverse_n) > reached
    found = da(data, form="two_sided")
    assert found.step is not None
    torch.testing.assert_close(found.step, found.B.T @ delta @ found.A.T, rtol=1e-8, atol=1e-8)


def test_da_variance_matters_for_little_data_only() -> None:
    """Consistent units: the fewer tokens to learn, the more weight the variance has (section 8.4)."""
    ratios = [
        da(make_data(counts=Counts(10, 500, 400, 10, n))).notes["variance_to_bias"] for n in (10, 1000, 10**5)
    ]

    assert ratios[0] == pytest.approx(100 * ratios[1], rel=1e-6) == pytest.approx(10**4 * ratios[2], rel=1e-6)
    bias_only = da(make_data(), use_variance=False).A
    much = da(make_data(), population=10**9).A
    assert chordal(bias_only, much) < 1e-3


@pytest.mark.parametrize("factor", ["diagonal", "block", "full"])
def test_da_output_factors(factor: str) -> None:
    """Theorem 4.2 on the Fisher matrix itself: J = Y ⊗ Z of row-wise vec, and its inverse's blocks."""
    data = make_data(full=factor != "diagonal")
    rule, Y = data.statistics.inputs, data.statistics.Y()
    assert isinstance(rule, SecondMoment)
    g, Z = data.statistics.g() / 10, rule.moment
    diagonal = Y if factor == "diagonal" else Y.diagonal()
    damped_Z = Z + 1e-3 * Z.diagonal().mean() * torch.eye(D_IN).double()
    full_Y = torch.diag(Y) if factor == "diagonal" else Y
    damped_Y = full_Y + 1e-3 * diagonal.median() * torch.eye(D_OUT).double()
    inverse = torch.linalg.inv(torch.kron(damped_Y, damped_Z))
    blocks = [inverse[j * D_IN : (j + 1) * D_IN, j * D_IN : (j + 1) * D_IN] for j in range(D_OUT)]  # J^-1_[j]
    if factor == "full":
        delta = -(inverse @ g.flatten()).view(D_OUT, D_IN)
    else:
        delta = torch.stack([-block @ row for block, row in zip(blocks, g, strict=True)])  # eq. 21
    omega = sum(blocks) / COUNTS.population_label_tokens - delta.T @ delta  # eq. 19
    expected = torch.linalg.eigh(omega)[1][:, :RANK].T

    fisher, found = module_step(data, options_of(output_factor=factor))
    torch.testing.assert_close(found, delta, rtol=1e-8, atol=1e-10)
    assert fisher.output_trace == pytest.approx(float(damped_Y.inverse().trace()), rel=1e-9)
    basis = da(make_data(full=factor != "diagonal"), output_factor=factor)
    assert chordal(basis.A, expected) < 1e-6
    assert basis.step is not None
    torch.testing.assert_close(
        basis.B @ basis.step @ basis.A, delta @ expected.T @ expected, rtol=1e-6, atol=1e-6
    )


def test_da_output_factors_are_three_spaces_where_outputs_are_correlated() -> None:
    spaces = {
        factor: da(correlated_outputs(full=factor != "diagonal"), output_factor=factor)
        for factor in ("diagonal", "block", "full")
    }
    for one, other in (("diagonal", "block"), ("block", "full"), ("full", "diagonal")):
        assert chordal(spaces[one].A, spaces[other].A) > 0.1
    uncorrelated = da(make_data(full=True), output_factor="block")
    assert chordal(uncorrelated.A, da(make_data()).A) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_factor": "full", "use_fisher": False}, "use_fisher is off"),
        ({"output_factor": "block", "form": "two_sided"}, "always uses the full output factor"),
    ],
)
def test_da_an_output_factor_that_would_do_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        METHODS["lora_da"].check(4, options_of(**options))
    assert caught.value.param == "output_factor"


def correlated_outputs(*, full: bool) -> ModuleData:
    """`make_data` with outputs turned by a random rotation, so that Y is far from diagonal."""
    data = make_data(full=True)
    Q = orthonormal(D_OUT, D_OUT, seed=8)
    Y = Q @ data.statistics.Y() @ Q.T
    data.statistics.outputs = Y if full else Y.diagonal().clone()
    return data


def options_of(**options: object) -> dict[str, Any]:
    return fill_options("lora_da", METHODS["lora_da"].options, options)


@pytest.mark.parametrize("form", ["core", "frozen_a", "two_sided"])
@pytest.mark.parametrize("mode", ["consistent", "repo"])
def test_da_start_in_its_own_basis(
    small: BaseModel, calibration: CalibrationSet, form: str, mode: str
) -> None:
    """The start that comes with the basis is the projection of the natural step of the same data."""
    check_start(small, calibration, {"form": form, "mode": mode})


@pytest.mark.parametrize("factor", ["block", "full"])
def test_da_start_with_other_output_factors(
    small: BaseModel, calibration: CalibrationSet, factor: str
) -> None:
    check_start(small, calibration, {"output_factor": factor})


def check_start(small: BaseModel, calibration: CalibrationSet, options: dict[str, str]) -> None:
    built = build_basis_and_step(small, method="lora_da", rank=4, calibration=calibration, **options)
    start = {"eta_init": "value", "eta": 1 / 1024, **options}

    own = make_init(built.basis, method="da_step", step=built.step, **start)
    projected = make_init(built.basis, method="da_step", base=small, calibration=calibration, **start)

    scale = float(own.abs().max())
    torch.testing.assert_close(own / scale, projected / scale, rtol=0, atol=2e-3)


@pytest.mark.parametrize("options", [{"use_variance": False}, {"use_bias": False}, {"use_fisher": False}])
def test_da_ablations_build(small: BaseModel, calibration: CalibrationSet, options: dict[str, bool]) -> None:
    basis = build_basis(small, method="lora_da", rank=4, calibration=calibration, **options)
    full = build_basis(small, method="lora_da", rank=4, calibration=calibration)

    assert basis.basis_id != full.basis_id
    assert basis.manifest.recipe["options"] == {**full.manifest.recipe["options"], **options}
    assert METHODS["lora_da"].needs_calibration == "labelled"
    assert spectral_norm(basis.B[0]) == pytest.approx(1, abs=1e-5)
