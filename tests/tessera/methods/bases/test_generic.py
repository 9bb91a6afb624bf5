"""The algebra that every basis shares (methods catalogue G1 to G6, G8, G9). G7 belongs to the trainer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tessera.errors import BasisMismatch
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis, canonical_signs, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.methods.bases import METHODS, CalibrationSet, build_basis, rebase
from tessera.methods.building.losses import attached
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import orthonormal, random_matrix, small_calibration, small_model

TOKENS = torch.tensor([[5, 17, 44, 3, 80, 22, 9]])


def make(model_id: str, *, rank: int = 4, seed: int = 0, names: tuple[str, ...] = ("a", "b")) -> Basis:
    factors = {
        ModuleShape(name, 12 + i, 10 + i): (
            random_matrix(rank, 12 + i, seed=seed + 7 * i),
            random_matrix(10 + i, rank, seed=seed + 7 * i + 3),
        )
        for i, name in enumerate(names)
    }
    return make_basis(model_id=model_id, method="test", factors=factors, recipe={})


def test_g1_forward_merge_and_canonical_form_agree() -> None:
    x, W = random_matrix(7, 12, seed=1), random_matrix(10, 12, seed=2)
    A, B, R, s = random_matrix(4, 12, seed=3), random_matrix(10, 4, seed=4), random_matrix(4, 4, seed=5), 1.7
    merged = x @ (W + s * B @ R @ A).T

    applied = x @ W.T + s * ((x @ A.T) @ R.T) @ B.T
    torch.testing.assert_close(applied, merged, rtol=0, atol=1e-12)
    (Q_A, L_A), (Q_B, L_B) = torch.linalg.qr(A.T), torch.linalg.qr(B)
    core = s * L_B @ R @ L_A.T
    torch.testing.assert_close(x @ (W + Q_B @ core @ Q_A.T).T, merged, rtol=0, atol=1e-12)

    shape = ModuleShape("m", 12, 10)
    basis = make_basis(model_id="0", method="test", factors={shape: (A, s * B)}, recipe={})
    served = basis.fold(R[None])[0]
    stored = x @ (W + basis.B[0].double() @ served @ basis.A[0].double()).T
    torch.testing.assert_close(stored, merged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(basis.unfold(served[None])[0], R, rtol=1e-5, atol=1e-5)


def test_g1_an_attached_adapter_equals_merged_weights() -> None:
    base = small_model(dtype=torch.float64)
    basis = build_basis(base, method="random", rank=3)
    core = 0.5 * random_matrix(basis.num_modules, 3, 3)
    with attached(base, basis, core), torch.no_grad():
        attached_logits = base.model(TOKENS).logits
    plain = base.model(TOKENS).logits
    merged = small_model(dtype=torch.float64)
    for index, module in enumerate(basis.manifest.modules):
        delta = basis.B[index].double() @ core[index] @ basis.A[index].double()
        merged.model.get_submodule(module.name).weight.data += delta

    torch.testing.assert_close(attached_logits, merged.model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert (attached_logits - plain).abs().max() > 0.1
    assert torch.equal(base.model(TOKENS).logits, plain), "the adapter must be gone after the block"


def test_g2_gradient_of_the_core_is_the_projected_weight_gradient() -> None:
    x, target = random_matrix(9, 12, seed=1), random_matrix(9, 10, seed=2)
    A, B, s = random_matrix(4, 12, seed=3), random_matrix(10, 4, seed=4), 0.6
    W = random_matrix(10, 12, seed=5).requires_grad_()
    R = random_matrix(4, 4, seed=6).requires_grad_()

    (x @ (W + s * B @ R @ A).T - target).square().sum().backward()

    torch.testing.assert_close(R.grad, s * B.T @ W.grad @ A.T, rtol=1e-12, atol=1e-12)


def test_g3_the_basis_is_an_orthogonal_projection() -> None:
    A, B = orthonormal(12, 4, seed=1).T, orthonormal(10, 4, seed=2)
    X, Y, core = random_matrix(10, 12, seed=3), random_matrix(10, 12, seed=4), random_matrix(4, 4, seed=5)

    def p(Z: Tensor) -> Tensor:
        return B @ B.T @ Z @ A.T @ A

    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(p(p(X)), p(X), **close)
    torch.testing.assert_close((p(X) * Y).sum(), (X * p(Y)).sum(), **close)
    torch.testing.assert_close(p(B @ core @ A), B @ core @ A, **close)
    split = p(X).square().sum() + (X - p(X)).square().sum()
    torch.testing.assert_close(X.square().sum(), split, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_g4_factors_are_orthonormal(
    small: BaseModel, calibration: CalibrationSet, method: str, dtype: str, tolerance: float
) -> None:
    """bfloat16 keeps 8 bits: each of d entries is off by up to 2^-9 of itself, and an entry of BᵀB - I by
    about 2^-9 √(2/d): 1e-3 at the widths of real models (512 and more), 4e-3 at most at these 16 to 48."""
    basis = build_basis(small, method=method, rank=4, calibration=calibration, dtype=dtype)

    for A, B in zip(basis.A, basis.B, strict=True):
        torch.testing.assert_close(A.double() @ A.double().T, torch.eye(4).double(), rtol=0, atol=tolerance)
        torch.testing.assert_close(B.double().T @ B.double(), torch.eye(4).double(), rtol=0, atol=tolerance)


def test_g4_bfloat16_at_a_real_width() -> None:
    factors = {ModuleShape("m", 1024, 1024): (random_matrix(16, 1024), random_matrix(1024, 16, seed=1))}
    basis = make_basis(model_id="0", method="test", factors=factors, recipe={}, dtype="bfloat16")

    B = basis.B[0].double()
    assert (B.T @ B - torch.eye(16)).abs().max() < 1e-3


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_g5_a_subtracted_start_is_training_from_zero(optimiser: str) -> None:
    """PiSSA's W - s B R_0 A with R from R_0 is W with R from 0: W need not be touched."""
    A, B, s = random_matrix(4, 12, seed=3), random_matrix(10, 4, seed=4), 0.8
    W, R0 = random_matrix(10, 12, seed=5), random_matrix(4, 4, seed=6)
    before = W.clone()

    offset = train(lambda R: W - s * B @ R0 @ A + s * B @ R @ A, R0.clone(), optimiser, lr=1e-3)
    plain = train(lambda R: W + s * B @ R @ A, torch.zeros(4, 4).double(), optimiser, lr=1e-3)

    torch.testing.assert_close(offset[0], plain[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(offset[1] - R0, plain[1], rtol=1e-9, atol=1e-12)
    assert plain[0][-1] < plain[0][0]
    assert torch.equal(W, before)


@pytest.mark.parametrize(("optimiser", "power"), [("sgd", 2), ("adam", 1)])
def test_g6_scale_is_a_learning_rate(optimiser: str, power: int) -> None:
    """(s, R, η) is (1, s R, s^p η), p = 2 for SGD and 1 for Adam (LoRAM, proposition 1)."""
    A, B, W = random_matrix(4, 12, seed=3), random_matrix(10, 4, seed=4), random_matrix(10, 12, seed=5)
    R0, s, lr = random_matrix(4, 4, seed=6), 2.5, 1e-4

    scaled = train(lambda R: W + s * B @ R @ A, R0.clone(), optimiser, lr=lr)
    plain = train(lambda R: W + B @ R @ A, s * R0, optimiser, lr=s**power * lr)
    control = train(lambda R: W + B @ R @ A, s * R0, optimiser, lr=lr)

    torch.testing.assert_close(s * scaled[1], plain[1], rtol=1e-10, atol=1e-10)
    assert (s * scaled[1] - control[1]).abs().max() > 1e-4


def train(
    weight: Callable[[Tensor], Tensor], R: Tensor, optimiser: str, *, lr: float
) -> tuple[Tensor, Tensor]:
    """Least squares on fixed data; the losses [20] and the final R."""
    x, target = random_matrix(30, 12, seed=11), random_matrix(30, 10, seed=12)
    R = R.requires_grad_()
    if optimiser == "sgd":
        step: torch.optim.Optimizer = torch.optim.SGD([R], lr=lr)
    else:
        step = torch.optim.Adam([R], lr=lr, eps=1e-30)
    losses = []
    for _ in range(20):
        step.zero_grad()
        loss = (x @ weight(R).T - target).square().mean()
        loss.backward()
        step.step()
        losses.append(loss.detach())
    return torch.stack(losses), R.detach()


METHODS_TO_REPEAT = tuple(METHODS)
BUILD = f"""
from tests.tessera.methods.bases.test_generic import built_ids
print(*built_ids({METHODS_TO_REPEAT}))
"""


def built_ids(methods: Sequence[str]) -> list[str]:
    base, calibration = small_model(), small_calibration()
    return [build_basis(base, method=m, rank=4, calibration=calibration).basis_id for m in methods]


def test_g8_m5_two_processes_build_the_same_bytes() -> None:
    here = built_ids(METHODS_TO_REPEAT)
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD], capture_output=True, text=True, check=True
    )

    assert other.stdout.split() == here
    assert len(set(here)) == len(METHODS_TO_REPEAT)


def test_g8_canonical_signs_do_not_depend_on_those_given() -> None:
    U, _, Vh = torch.linalg.svd(random_matrix(10, 12), full_matrices=False)
    flips = torch.tensor([1, -1] * 5, dtype=torch.float64)

    flipped = canonical_signs(U * flips, Vh * flips[:, None])

    for mine, other in zip(canonical_signs(U, Vh), flipped, strict=True):
        assert torch.equal(mine, other)


def test_g8_an_adapter_is_refused_under_another_basis() -> None:
    basis, other = make("0"), make("0", seed=50)
    blob = Adapter(basis.basis_id, torch.zeros(2, 4, 4)).to_bytes(version=1)

    Adapter.from_bytes(blob, basis_id=basis.basis_id)
    with pytest.raises(BasisMismatch, match=other.basis_id):
        Adapter.from_bytes(blob, basis_id=other.basis_id)


@pytest.mark.parametrize("new_rank", [3, 4, 9])
def test_g9_rebasing_is_the_least_squares_optimum(new_rank: int) -> None:
    old, new = make("0"), make("0", rank=new_rank, seed=50)
    adapter = Adapter(old.basis_id, random_matrix(2, 4, 4, dtype=torch.float32))

    moved, loss = rebase(adapter, old, new)

    lost = total = 0.0
    for i in range(2):
        delta = old.B[i].double() @ adapter.R[i].double() @ old.A[i].double()
        design = torch.kron(
            new.B[i].double(), new.A[i].double().T.contiguous()
        )  # on M's rows, one after another
        best = torch.linalg.lstsq(design, delta.reshape(-1, 1)).solution.reshape(new_rank, new_rank)
        torch.testing.assert_close(moved.R[i].double(), best, rtol=1e-5, atol=1e-6)
        lost += float((delta - new.B[i].double() @ best @ new.A[i].double()).square().sum())
        total += float(delta.square().sum())
    assert loss == pytest.approx(lost / total, abs=1e-6)
    ratio = float(moved.R.square().sum() / adapter.R.square().sum())
    assert loss == pytest.approx(1 - ratio, abs=1e-6)
    assert moved.metadata["relative_loss"] == loss


def test_g9_rebasing_edges() -> None:
    old = make("0")
    adapter = Adapter(old.basis_id, random_matrix(2, 4, 4, dtype=torch.float32))

    same, loss = rebase(adapter, old, old)
    assert loss == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(same.R, adapter.R)
    fewer = make("0", names=("a",))
    moved, loss = rebase(adapter, old, fewer)
    assert loss == pytest.approx(float(adapter.R[1].square().sum() / adapter.R.square().sum()), abs=1e-6)
    torch.testing.assert_close(moved.R[0], adapter.R[0])
    assert rebase(Adapter(old.basis_id, torch.zeros(2, 4, 4)), old, fewer)[1] == 0
    with pytest.raises(BasisMismatch, match="model"):
        rebase(adapter, old, make("1"))
    with pytest.raises(BasisMismatch, match=fewer.basis_id):
        rebase(adapter, fewer, old)
