"""Starts go with any basis, lower the loss where they promise to, and make the papers' presets."""

from __future__ import annotations

import json

import pytest
import torch

from tessera.formats.adapter import Adapter
from tessera.methods.bases import METHODS, CalibrationSet, build_basis, build_basis_and_step
from tessera.methods.building.losses import attached, mean_loss
from tessera.methods.init import INIT_METHODS, PRESETS, compute_init, make_init
from tessera.methods.init.method import InitInputs
from tessera.methods.init.step_size import parabola_minimum
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import random_matrix, small_calibration

CALLER = {"learning_rate": 1e-3, "total_steps": 100}


@pytest.mark.parametrize("basis_method", ["random", "lora_xs", "lora_da"])
@pytest.mark.parametrize("start", ["sb_step", "da_step", "gradient"])
def test_a_line_searched_start_lowers_the_loss_in_any_basis(
    small: BaseModel, calibration: CalibrationSet, basis_method: str, start: str
) -> None:
    basis = build_basis(small, method=basis_method, rank=4, calibration=calibration)
    user = small_calibration(6, seed=4)

    found = compute_init(InitInputs(basis, small, user), method=start)

    before = mean_loss(small, user)
    with attached(small, basis, basis.fold(found.R0)):
        after = mean_loss(small, user)
    assert after < before - 1e-3
    assert after == pytest.approx(min(found.notes["losses"].values()), rel=1e-4)
    assert found.notes["losses"]["0"] == pytest.approx(before, rel=1e-6)
    assert found.notes["eta"] > 0
    assert len(found.notes["losses"]) <= 9


def test_a_useless_step_is_not_taken(small: BaseModel, calibration: CalibrationSet) -> None:
    built = build_basis_and_step(small, method="gradient_svd", rank=4, calibration=calibration)
    assert built.step is not None
    uphill = make_init(built.basis, method="gradient", base=small, calibration=calibration, step=-built.step)

    assert not uphill.any()


def test_parabola_through_three_losses() -> None:
    losses = {eta: (eta - 2.5) ** 2 for eta in (0.0, 1.0, 2.0, 4.0)}
    assert parabola_minimum(losses) == pytest.approx(2.5)
    assert parabola_minimum({0.0: 1.0, 1.0: 0.5}) is None
    assert parabola_minimum({0.0: 1.0, 1.0: 0.5, 4.0: float("inf")}) is None


@pytest.mark.parametrize("method", ["lora_xs", "lora_sb", "pissa"])
def test_a_warm_start_serves_what_the_adapter_served(
    small: BaseModel, calibration: CalibrationSet, method: str
) -> None:
    basis = build_basis(small, method=method, rank=4, calibration=calibration, scale=0.5)
    adapter = Adapter(basis.basis_id, random_matrix(14, 4, 4, dtype=torch.float32))

    R0 = make_init(basis, method="warm", adapter=adapter)

    torch.testing.assert_close(basis.fold(R0), adapter.R, rtol=1e-4, atol=1e-5)


def test_a_warm_start_from_another_rank_of_the_same_method(small: BaseModel) -> None:
    """The basis of rank 4 lies in that of rank 8, so nothing is lost."""
    old, new = build_basis(small, rank=4), build_basis(small, rank=8)
    adapter = Adapter(old.basis_id, random_matrix(14, 4, 4, dtype=torch.float32))

    found = compute_init(InitInputs(new, adapter=adapter, adapter_basis=old), method="warm")

    assert found.notes["relative_loss"] == pytest.approx(0, abs=1e-6)
    served = new.fold(found.R0)
    for i in range(14):
        before = old.B[i] @ adapter.R[i] @ old.A[i]
        torch.testing.assert_close(new.B[i] @ served[i] @ new.A[i], before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_and_starts(small: BaseModel, calibration: CalibrationSet, name: str) -> None:
    preset = PRESETS[name]
    built = build_basis_and_step(
        small, method=preset.basis, rank=4, calibration=calibration, **preset.basis_options
    )
    request = InitInputs(built.basis, small, calibration, step=built.step if preset.own_basis else None)
    caller = {option: CALLER[option] for option in preset.caller_sets}

    found = compute_init(request, method=preset.init, **preset.init_options, **caller)

    assert found.R0.shape == (14, 4, 4)
    assert found.R0.dtype == torch.float32
    assert bool(found.R0.any()) is (preset.init != "zero")
    assert preset.own_basis <= (built.step is not None)
    assert found.notes["method"] == preset.init


def test_the_registries_describe_themselves() -> None:
    assert set(METHODS) >= {
        "lora_xs", "lora_sb", "lora_da", "loram", "lolora", "pissa", "milora", "olora", "lora_ga", "lora_one",
        "corda", "eva", "gradient_svd", "random",
    }  # fmt: skip
    for name, method in {**METHODS, **INIT_METHODS}.items():
        assert method.name == name
        assert method.description
        assert method.needs_calibration in ("none", "text", "labelled")
        for option in method.options.values():
            assert option.description
            assert option.default is None or option.check("option", option.default) == option.default
        described = json.loads(json.dumps(method.describe()))
        assert described["options"].keys() == method.options.keys()
    vectors = METHODS["lora_xs"].describe()["options"]["vectors"]
    assert vectors["choices"] == ["top", "middle", "bottom", "random", "svd_of_random"]
    assert "minimum" not in vectors
    assert METHODS["lora_da"].describe()["options"]["population"]["type"] == "int"
