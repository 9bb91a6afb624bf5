"""LoRA-DA's forms, its ablations and its start (beside the catalogue's DA1 to DA8)."""

from __future__ import annotations

import pytest
import torch

from tessera.methods.bases import METHODS, CalibrationSet, build_basis, build_basis_and_step
from tessera.methods.bases.lora_da_guidance import two_sided, two_sided_bound
from tessera.methods.building.collected import Counts
from tessera.methods.building.decomposition import spectral_norm
from tessera.methods.init import make_init
from tessera.model.base_model import BaseModel
from tests.tessera.methods.da_module import D_IN, D_OUT, RANK, da, fisher_of, make_data
from tests.tessera.methods.matrices import chordal, random_matrix


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


@pytest.mark.parametrize("form", ["core", "frozen_a", "two_sided"])
@pytest.mark.parametrize("mode", ["consistent", "repo"])
def test_da_start_in_its_own_basis(
    small: BaseModel, calibration: CalibrationSet, form: str, mode: str
) -> None:
    """The start that comes with the basis is the projection of the natural step of the same data."""
    options = {"form": form, "mode": mode}
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
