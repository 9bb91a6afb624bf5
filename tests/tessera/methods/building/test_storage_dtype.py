"""Sixteen bits for the factors that adapters are trained in: what that changes, and what it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.defaults import BUNDLED_MODEL
from tessera.formats.adapter import Adapter
from tessera.formats.basis import DTYPES, Basis, storage_dtype
from tessera.methods.bases import CalibrationSet, build_basis, build_basis_and_step
from tessera.methods.init import make_init
from tessera.model.base_model import BaseModel
from tessera.model.layout import linear_shapes
from tessera.peft.exporting import to_peft
from tessera.peft.importing import core_in, read_peft
from tests.tessera.methods.matrices import random_matrix

#: Of B R A, by how the factors are stored. Rounding to nearest costs about 2^-12 or 2^-9 of each factor.
MAX_ERROR = {"float16": 4e-4, "bfloat16": 3.2e-3}


def delta(basis: Basis, R: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """B R A of all modules, flattened, float64. dtype: what engine and trainer convert the factors to."""
    products = []
    for A, B, core in zip(basis.A, basis.B, R.double(), strict=True):
        if dtype is not None:
            A, B = A.to(dtype), B.to(dtype)
        products.append((B.double() @ core @ A.double()).flatten())
    return torch.cat(products)


def difference(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def test_a_model_in_bfloat16_has_bases_in_bfloat16_and_every_other_in_float16() -> None:
    chosen = {dtype: storage_dtype(dtype) for dtype in (*DTYPES.values(), torch.float64)}

    assert chosen.pop(torch.bfloat16) == "bfloat16"
    assert set(chosen.values()) == {"float16"}


@pytest.mark.parametrize("dtype", MAX_ERROR)
@pytest.mark.parametrize("method", ["lora_xs", "loram", "random"])
def test_rounding_changes_a_delta_by_little(tiny: BaseModel, method: str, dtype: str) -> None:
    """For a core that was not made for the rounded factors. float16 is eight times closer."""
    options: dict[str, Any] = {"method": method, "rank": 8, "target_modules": ["q_proj", "down_proj"]}
    exact, rounded = build_basis(tiny, **options), build_basis(tiny, **options, dtype=dtype)
    R = random_matrix(exact.num_modules, 8, 8)

    error = difference(delta(rounded, R), delta(exact, R))

    assert MAX_ERROR[dtype] / 4 < error < MAX_ERROR[dtype]
    torch.testing.assert_close(rounded.P_in, exact.P_in, rtol=0, atol=0)
    torch.testing.assert_close(rounded.P_out, exact.P_out, rtol=0, atol=0)
    assert 2 * rounded.manifest.factor_bytes == exact.manifest.factor_bytes
    blobs = list(rounded.module_bytes())
    again = Basis.from_bytes(rounded.manifest, blobs, rounded.preconditioner_bytes())
    assert again.digest() == rounded.basis_id != exact.basis_id


def test_a_model_in_bfloat16_works_with_the_same_numbers_as_before(tiny: BaseModel) -> None:
    """Converted from float32, or stored as bfloat16: the same but for ties. By way of float16 they differ."""
    options: dict[str, Any] = {"method": "lora_xs", "rank": 8, "target_modules": ["q_proj", "down_proj"]}
    exact, direct, detour = (build_basis(tiny, **options, dtype=dtype) for dtype in
                             ("float32", "bfloat16", "float16"))  # fmt: skip

    def share_of_others(basis: Basis) -> float:
        pairs = zip((*basis.A, *basis.B), (*exact.A, *exact.B), strict=True)
        differ = [(X.to(torch.bfloat16) != Y.to(torch.bfloat16)).flatten() for X, Y in pairs]
        return float(torch.cat(differ).float().mean())

    assert share_of_others(direct) < 1e-3
    assert share_of_others(detour) > 3e-2


@pytest.mark.parametrize("dtype", MAX_ERROR)
def test_the_start_of_lora_sb_stays_the_best_approximation_of_its_step(
    small: BaseModel, calibration: CalibrationSet, dtype: str
) -> None:
    """s B R_0 A in the rounded factors against the exact ones: 2^-11 or 2^-8 of a step, not another one."""
    options: dict[str, Any] = {"method": "lora_sb", "rank": 4, "calibration": calibration}
    start: dict[str, Any] = {"method": "sb_step", "eta_init": "value", "eta": 1e-3}
    exact = build_basis_and_step(small, **options)
    rounded = build_basis_and_step(small, **options, dtype=dtype)
    assert exact.step is not None
    assert rounded.step is not None
    torch.testing.assert_close(rounded.step, exact.step, rtol=0, atol=0)

    changes = []
    for built in (exact, rounded):
        R0 = make_init(built.basis, step=built.step, **start)
        changes.append(delta(built.basis, built.basis.fold(R0)))
    assert difference(changes[1], changes[0]) < MAX_ERROR[dtype]
    # A start that is projected onto the rounded factors is the optimum in them, so at most that far too.
    R0 = make_init(rounded.basis, base=small, calibration=calibration, **start)
    projected = delta(rounded.basis, rounded.basis.fold(R0))
    assert difference(projected, changes[0]) < MAX_ERROR[dtype]


@pytest.mark.parametrize("dtype", MAX_ERROR)
def test_an_exported_adapter_is_exact_and_finds_its_basis_again(tiny: BaseModel, dtype: str) -> None:
    """PEFT gets the factors that were trained in, as float32, and they come home as the same core."""
    basis = build_basis(tiny, rank=4, target_modules=["q_proj", "down_proj"], dtype=dtype)
    R = random_matrix(basis.num_modules, 4, 4, dtype=torch.float32)
    files = to_peft(basis, Adapter(basis.basis_id, R), base_model="tiny")

    lora = read_peft(files.adapter_config, files.adapter_model, linear_shapes(BUNDLED_MODEL))

    for index, module in enumerate(basis.manifest.modules):
        A, B = basis.A[index].double(), basis.B[index].double()
        change = lora.changes[module]
        product = change.scale * change.B.double() @ change.A.double()
        torch.testing.assert_close(product, B @ R[index].double() @ A, rtol=1e-5, atol=1e-6)
    core = core_in(lora, basis)
    assert core is not None
    torch.testing.assert_close(core, R, rtol=1e-5, atol=1e-5)
