"""The basis: canonical, deterministic, verified; and that of LoRA-XS against the theorem that defines it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera.errors import CorruptRecord, InvalidInput, UnsupportedModel
from tessera.formats.basis import Basis, canonical_signs, make_basis
from tessera.formats.manifest import BasisManifest, ModuleShape
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel, iter_target_modules

SHAPE = ModuleShape("layer.q_proj", 11, 9)
#: Largest |A Aᵀ - I| that rounding to the storage dtype explains.
MAX_ORTHONORMALITY_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def random_factors(rank: int = 3, *, seed: int = 0, shape: ModuleShape = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, shape.d_in, generator=generator, dtype=torch.float64)
    return A, torch.randn(shape.d_out, rank, generator=generator, dtype=torch.float64)


def small_basis(rank: int = 3, *, num_modules: int = 2, dtype: str = "float32", model_id: str = "m") -> Basis:
    shapes = [ModuleShape(f"layer.{i}.q_proj", 11 + i, 9) for i in range(num_modules)]
    factors = {shape: random_factors(rank, seed=i, shape=shape) for i, shape in enumerate(shapes)}
    return make_basis(model_id=model_id, method="test", factors=factors, recipe={"seed": 0}, dtype=dtype)


def orthonormality_error(basis: Basis) -> float:
    identity = torch.eye(basis.rank, dtype=torch.float64)
    errors = [(A.double() @ A.double().T - identity).abs().max() for A in basis.A]
    errors += [(B.double().T @ B.double() - identity).abs().max() for B in basis.B]
    return float(max(errors))


# The canonical form


@pytest.mark.parametrize("dtype", MAX_ORTHONORMALITY_ERROR)
def test_factors_are_orthonormal_in_every_storage_dtype(dtype: str) -> None:
    basis = small_basis(5, dtype=dtype)
    assert orthonormality_error(basis) < MAX_ORTHONORMALITY_ERROR[dtype]
    assert {str(tensor.dtype) for tensor in (*basis.A, *basis.B)} == {f"torch.{dtype}"}


def test_tiny_basis_is_orthonormal(tiny_basis: Basis) -> None:
    assert orthonormality_error(tiny_basis) < 1e-5


@given(st.integers(2, 9), st.integers(0, 2**16), st.floats(1e-3, 1e3))
def test_fold_gives_the_core_that_does_the_same(rank: int, seed: int, scale: float) -> None:
    """s B' R' A' = B fold(s R') A: because of this equation, serving needs to know no method."""
    raw_A, raw_B = random_factors(rank, seed=seed)
    basis = make_basis(model_id="m", method="test", factors={SHAPE: (raw_A, raw_B)}, recipe={})
    trained = torch.randn(1, rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = scale * raw_B @ trained[0] @ raw_A
    actual = basis.B[0].double() @ basis.fold(scale * trained)[0] @ basis.A[0].double()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_unfold_is_the_inverse_of_fold() -> None:
    basis = small_basis(4)
    R = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(basis.unfold(basis.fold(R)), R)
    torch.testing.assert_close(basis.fold(basis.unfold(R)), R)


def test_orthonormal_factors_come_back_unchanged() -> None:
    first = small_basis(4)
    factors = {module: (A, B) for module, A, B in zip(first.manifest.modules, first.A, first.B, strict=True)}
    again = make_basis(model_id="m", method="test", factors=factors, recipe={})
    for old, new in zip((*first.A, *first.B), (*again.A, *again.B), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    for P in (again.P_in, again.P_out):
        torch.testing.assert_close(P, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-6)


@given(st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4), st.integers(0, 2**16))
def test_signs_of_singular_pairs_do_not_matter(signs: list[float], seed: int) -> None:
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    flip = torch.tensor(signs, dtype=torch.float64)
    expected, actual = canonical_signs(U, Vh), canonical_signs(U * flip, Vh * flip[:, None])
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0] * S @ actual[1], W)
    assert (actual[0].gather(0, actual[0].abs().argmax(0)[None]) > 0).all()


# The digest


def test_digest_is_the_same_in_another_process(tiny: BaseModel) -> None:
    script = (
        "from tessera.defaults import BUNDLED_MODEL\n"
        "from tessera.model.base_model import load_base_model\n"
        "from tessera.methods.bases import build_basis\n"
        "base = load_base_model(BUNDLED_MODEL, device='cpu', dtype='float32')\n"
        "print(build_basis(base, rank=4, target_modules=['q_proj', 'down_proj']).basis_id)\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    here = build_basis(tiny, rank=4, target_modules=["q_proj", "down_proj"])
    assert result.stdout.split()[-1] == here.basis_id


def test_digest_depends_on_everything_that_serving_uses() -> None:
    basis = small_basis()
    variants = [
        small_basis(2),
        small_basis(num_modules=1),
        small_basis(dtype="bfloat16"),
        small_basis(model_id="other"),
    ]
    assert len({basis.basis_id, *(variant.basis_id for variant in variants)}) == 5
    assert small_basis().basis_id == basis.basis_id == basis.digest()


def test_recipe_is_no_part_of_the_digest() -> None:
    basis = small_basis()
    assert replace(basis, manifest=replace(basis.manifest, recipe={"seed": 1})).digest() == basis.basis_id


@pytest.mark.parametrize("dtype", MAX_ORTHONORMALITY_ERROR)
def test_stored_bytes_come_back(dtype: str) -> None:
    basis = small_basis(dtype=dtype)
    manifest = BasisManifest.from_json(basis.manifest.to_json())
    assert manifest == basis.manifest
    modules = list(basis.module_bytes())
    assert sum(map(len, modules)) == manifest.factor_bytes
    read = Basis.from_bytes(manifest, modules, basis.preconditioner_bytes())
    for old, new in zip((*basis.A, *basis.B), (*read.A, *read.B), strict=True):
        assert torch.equal(new, old)
    assert torch.equal(read.P_in, basis.P_in)
    assert torch.equal(read.P_out, basis.P_out)


@given(st.integers(0, 2), st.integers(0, 10_000), st.integers(0, 7))
def test_one_changed_bit_is_refused(part: int, position: int, bit: int) -> None:
    basis = small_basis()
    parts = [*(bytearray(blob) for blob in basis.module_bytes()), bytearray(basis.preconditioner_bytes())]
    parts[part][position % len(parts[part])] ^= 1 << bit
    modules = [bytes(blob) for blob in parts[:-1]]
    with pytest.raises(CorruptRecord, match=basis.basis_id):
        Basis.from_bytes(basis.manifest, modules, bytes(parts[-1]))


def test_bytes_of_another_length_are_refused() -> None:
    basis = small_basis()
    modules, preconditioner = list(basis.module_bytes()), basis.preconditioner_bytes()
    with pytest.raises(CorruptRecord, match="q_proj"):
        Basis.from_bytes(basis.manifest, [modules[0][:-4], modules[1]], preconditioner)
    with pytest.raises(CorruptRecord, match="preconditioner"):
        Basis.from_bytes(basis.manifest, modules, preconditioner + bytes(4))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "modules": [{"name": 1}]}']
)
def test_unreadable_manifests_are_refused(text: str) -> None:
    with pytest.raises(CorruptRecord):
        BasisManifest.from_json(text)


def test_manifest_of_a_newer_format_says_so() -> None:
    fields = json.loads(small_basis().manifest.to_json()) | {"format": 2}
    with pytest.raises(CorruptRecord, match="format 2"):
        BasisManifest.from_json(json.dumps(fields))


def test_rank_one_is_stored_like_any_other() -> None:
    basis = small_basis(1)
    read = Basis.from_bytes(basis.manifest, list(basis.module_bytes()), basis.preconditioner_bytes())
    assert torch.equal(read.B[0], basis.B[0])


# What cannot be a basis


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        (torch.zeros(3, 11), torch.ones(9, 3), "linearly dependent"),
        (torch.ones(3, 11), torch.eye(9)[:, :3], "linearly dependent"),
        (torch.full((1, 11), float("nan")), torch.ones(9, 1), "not finite"),
        (torch.ones(1, 10), torch.ones(9, 1), r"expected \[r, 11\]"),
        (torch.ones(1, 11), torch.ones(9, 2), r"expected \[r, 11\]"),
        (torch.ones(10, 11), torch.ones(9, 10), "exceeds the smaller side 9"),
    ],
)
def test_unfit_factors_are_refused_with_the_module(A: Tensor, B: Tensor, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        make_basis(model_id="m", method="test", factors={SHAPE: (A, B)}, recipe={})
    assert SHAPE.name in refused.value.message


def test_unknown_method_and_dtype_are_refused(tiny: BaseModel) -> None:
    with pytest.raises(InvalidInput, match="unknown method 'no_such_method'") as refused:
        build_basis(tiny, method="no_such_method")
    assert refused.value.param == "method"
    with pytest.raises(InvalidInput, match="float64") as refused:
        build_basis(tiny, rank=2, target_modules=["q_proj"], dtype="float64")
    assert refused.value.param == "dtype"


@pytest.mark.parametrize("rank", [0, -1, 100_000])
def test_a_rank_out_of_range_names_the_module(tiny: BaseModel, rank: int) -> None:
    with pytest.raises(InvalidInput, match=r"model\.layers\.0\.\S+proj") as refused:
        build_basis(tiny, rank=rank)
    assert refused.value.param == "rank"


def test_no_target_module_lists_the_candidates(tiny: BaseModel) -> None:
    with pytest.raises(UnsupportedModel, match="q_proj"):
        build_basis(tiny, target_modules=["query"])


# LoRA-XS


def test_lora_xs_is_the_best_approximation_of_its_rank(tiny: BaseModel, tiny_basis: Basis) -> None:
    """Eckart-Young: ‖W - B Bᵀ W Aᵀ A‖² is the sum of the squares of the omitted singular values."""
    linears = dict(iter_target_modules(tiny.model))
    for i, module in enumerate(tiny_basis.manifest.modules):
        W = linears[module.name].weight.double()
        A, B = tiny_basis.A[i].double(), tiny_basis.B[i].double()
        S = torch.linalg.svdvals(W)
        core = B.T @ W @ A.T
        torch.testing.assert_close((W - B @ core @ A).square().sum(), S[8:].square().sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(core, torch.diag(S[:8]), rtol=1e-5, atol=1e-5 * float(S[0]))


def test_lora_xs_trains_with_sigma_on_the_input_side(tiny: BaseModel, tiny_basis: Basis) -> None:
    linears = dict(iter_target_modules(tiny.model))
    for i, module in enumerate(tiny_basis.manifest.modules):
        S = torch.linalg.svdvals(linears[module.name].weight.double())[:8].float()
        torch.testing.assert_close(tiny_basis.P_in[i], torch.diag(S), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tiny_basis.P_out[i], torch.eye(8), rtol=0, atol=1e-5)


def test_lora_xs_without_sigma_trains_in_the_orthonormal_basis(tiny: BaseModel) -> None:
    basis = build_basis(tiny, rank=3, target_modules=["o_proj"], with_sigma=False)
    torch.testing.assert_close(basis.P_in, torch.eye(3).expand_as(basis.P_in), rtol=0, atol=1e-5)


def test_building_reports_progress_and_leaves_the_generator_alone(tiny: BaseModel) -> None:
    steps: list[tuple[int, int]] = []
    before = torch.random.get_rng_state()
    basis = build_basis(
        tiny, rank=2, target_modules=["k_proj"], progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(i, basis.num_modules) for i in range(1, basis.num_modules + 1)]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_basis_at_full_rank_spans_everything(tiny: BaseModel) -> None:
    name, linear = next(iter_target_modules(tiny.model, ["k_proj"]))
    side = min(linear.weight.shape)
    basis = build_basis(tiny, rank=side, target_modules=[name])
    W, A, B = linear.weight.double(), basis.A[0].double(), basis.B[0].double()
    torch.testing.assert_close(B @ (B.T @ W @ A.T) @ A, W, rtol=0, atol=1e-5)
