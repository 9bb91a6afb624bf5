"""Every method and start on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from tessera.methods.bases import METHODS, CalibrationSet, build_basis, build_basis_and_step
from tessera.methods.building.losses import attached, mean_loss
from tessera.methods.init import INIT_METHODS, make_init
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import chordal, small_model

pytestmark = pytest.mark.gpu
#: Small gradients decide signs, and what learns step by step follows a path: these differ with the device's
#: rounding.
SENSITIVE = {"lora_sb": 0.3, "lolora": 0.1, "population": 0.3}


@pytest.fixture(scope="module")
def on_cuda() -> BaseModel:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    base = small_model()
    base.model.to("cuda")
    return base


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_basis_does_not_depend_on_the_device(
    on_cuda: BaseModel, small: BaseModel, calibration: CalibrationSet, method: str
) -> None:
    there = build_basis(on_cuda, method=method, rank=4, calibration=calibration)
    here = build_basis(small, method=method, rank=4, calibration=calibration)

    assert there.A[0].device.type == "cpu"
    for i in range(here.num_modules):
        assert chordal(there.A[i], here.A[i]) < SENSITIVE.get(method, 2e-2)
        assert chordal(there.B[i].T, here.B[i].T) < SENSITIVE.get(method, 2e-2)


@pytest.mark.parametrize("start", sorted(set(INIT_METHODS) - {"warm", "population"}))
def test_a_start_does_not_depend_on_the_device(
    on_cuda: BaseModel, small: BaseModel, calibration: CalibrationSet, start: str
) -> None:
    basis = build_basis(small, rank=4)
    options = {"eta_init": "value", "eta": 1e-3} if start.endswith("step") or start == "gradient" else {}

    there, here = (
        make_init(basis, method=start, base=base, calibration=calibration, **options)
        for base in (on_cuda, small)
    )

    scale = float(here.abs().max()) or 1.0
    torch.testing.assert_close(there / scale, here / scale, rtol=0, atol=2e-2)


def test_a_line_search_works_on_the_device(on_cuda: BaseModel, calibration: CalibrationSet) -> None:
    built = build_basis_and_step(on_cuda, method="lora_da", rank=4, calibration=calibration)
    R0 = make_init(built.basis, method="da_step", base=on_cuda, calibration=calibration, step=built.step)

    before = mean_loss(on_cuda, calibration)
    with attached(on_cuda, built.basis, built.basis.fold(R0)):
        assert mean_loss(on_cuda, calibration) < before
