"""LoRA-DA where the data is fewer tokens than a module is wide, so that its input moment is singular."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessera.chat.chat_format import ChatFormat
from tessera.chat.tokenizer import load_tokenizer
from tessera.data.examples import parse_examples
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput
from tessera.methods.algebra.lora_da_guidance import damped_inverse, eigen_inverse, invert_fisher
from tessera.methods.bases import CalibrationSet, build_basis, build_basis_and_step
from tessera.methods.building.targets import find_targets
from tessera.model.base_model import BaseModel, load_base_model
from tests.tessera.methods.matrices import chordal, orthonormal, random_matrix

DATA = Path(__file__).parents[3] / "data"
#: 768 wide; 350 tokens of 8 examples span less than half of it, and Cholesky fails.
WIDE = ("model.layers.3.mlp.down_proj", "model.layers.5.mlp.down_proj")
#: Whose gradients are cheap.
LAST = ("*.layers.5.*.q_proj", "*.layers.5.*.v_proj", "*.layers.5.*.o_proj")


def jargon(num_examples: int) -> CalibrationSet:
    chat = ChatFormat(load_tokenizer(BUNDLED_MODEL))
    examples = parse_examples((DATA / "jargon.jsonl").read_bytes())[:num_examples]
    return CalibrationSet.from_encoded(
        row for example in examples for row in chat.encode_rows(example, max_tokens=128)
    )


def moment(n: int, values: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix [n, n] with these eigenvalues, and its eigenvectors [n, n]."""
    Q = orthonormal(n, n, seed=seed)
    return Q * values @ Q.T, Q


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_ways_invert_alike(dtype: torch.dtype) -> None:
    """Where Cholesky works the eigenvalues give the same inverse."""
    values = torch.logspace(-3, 2, 40, dtype=torch.float64)
    X = moment(40, values)[0].to(dtype)

    by_cholesky, nothing = damped_inverse(X, 1e-3, "X")
    by_eigenvalues, none = eigen_inverse(X, 1e-3, "X")

    assert nothing is None is none
    tolerance = 1e-9 if dtype == torch.float64 else 2e-2
    error = torch.linalg.matrix_norm(by_eigenvalues - by_cholesky, ord=2)
    assert float(error) < tolerance * float(torch.linalg.matrix_norm(by_cholesky, ord=2))


def test_negative_eigenvalues_of_rounding_are_zero() -> None:
    """X = a singular moment with rounding of 2e-6 and damping of 1e-6: the answer is that of the moment."""
    values = torch.cat([torch.linspace(-2e-6, 1e-6, 10), torch.logspace(-2, 2, 20)]).double()
    X, Q = moment(30, values)
    clean = (Q[:, 10:] * values[10:] @ Q[:, 10:].T) + 1e-6 * torch.eye(30)

    inverse, unseen = damped_inverse(X, 1e-6, "X")

    torch.testing.assert_close(inverse, torch.linalg.inv(clean), rtol=1e-6, atol=1e-3)
    assert unseen is not None
    assert chordal(unseen.T, Q[:, :10].T) < 1e-6
    zeros, _ = damped_inverse(torch.zeros(3, 3), 0.5, "nothing")
    torch.testing.assert_close(zeros, 2 * torch.eye(3))


def test_the_step_is_zero_where_there_is_no_data() -> None:
    """g of rounding alone in the unseen directions: Δ is the step of the exact g and Z, on both sides."""
    noisy = torch.cat([torch.linspace(-2e-6, 1e-6, 10), torch.logspace(-2, 2, 20)]).double()
    Z, Q = moment(30, noisy)
    Y, P = moment(20, torch.cat([torch.linspace(-3e-6, 2e-6, 5), torch.logspace(-1, 1, 15)]).double(), seed=5)
    exact_g = P[:, 5:] @ random_matrix(15, 20, seed=1) @ Q[:, 10:].T
    g = exact_g + 1e-7 * random_matrix(20, 30, seed=2)

    fisher = invert_fisher(Z, Y, damping=1e-6, is_relative=False, name="layer")
    step = fisher.natural_step(g)

    scaled = P[:, 5:] / (torch.logspace(-1, 1, 15).double() + 1e-6) @ P[:, 5:].T @ exact_g
    exact = -scaled @ (Q[:, 10:] / (noisy[10:] + 1e-6) @ Q[:, 10:].T)
    torch.testing.assert_close(step, exact, rtol=1e-4, atol=1e-4)
    unchecked = fisher.Y_inv @ g @ fisher.Z_inv
    assert float((unchecked + exact).abs().max()) > 10 * float(exact.abs().max())


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_rounding_near_the_damping_is_told_apart_too(share: float) -> None:
    """At 0.9 of it Cholesky gives an inverse, ten times too large in a direction that no data has."""
    values = torch.cat([torch.tensor([-share * 1e-6]), torch.logspace(-2, 2, 29)]).double()
    X, Q = moment(30, values)

    inverse, unseen = damped_inverse(X, 1e-6, "X")

    assert float(torch.linalg.matrix_norm(inverse, ord=2)) == pytest.approx(1e6, rel=1e-3)
    assert unseen is not None
    assert chordal(unseen.T, Q[:, :1].T) < 1e-6


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [(0.0, r"the input moment of layer has eigenvalues from -0.001 to 1:"), (float("nan"), "layer holds a")],
)
def test_what_is_no_moment_is_refused(spoilt: float, message: str) -> None:
    X, _ = moment(12, torch.cat([torch.linspace(0.1, 1, 11), torch.tensor([-1e-3])]).double())
    X[3, 3] += spoilt

    with pytest.raises(InvalidInput, match=message) as raised:
        invert_fisher(X, torch.ones(5), damping=1e-6, is_relative=False, name="layer")
    assert raised.value.param == "calibration"


@pytest.mark.parametrize("num_examples", [8, 50])
def test_repo_mode_on_small_data(tiny: BaseModel, num_examples: int) -> None:
    """Absolute damping of 1e-6 with fewer tokens than d_in: a basis and a start, finite and orthonormal."""
    built = build_basis_and_step(
        tiny, method="lora_da", rank=4, calibration=jargon(num_examples), mode="repo",
        target_modules=(*LAST, *WIDE),
    )  # fmt: skip

    assert built.step is not None
    assert bool(torch.isfinite(built.step).all())
    for A, B in zip(built.basis.A, built.basis.B, strict=True):
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)


def test_repo_mode_on_small_data_is_that_of_exact_sums(tiny: BaseModel) -> None:
    """Against the same in float64. Inverted without a check the spaces are 1.4 and 2.0 apart, of 2."""
    calibration = jargon(4)
    exact_base = load_base_model(BUNDLED_MODEL, device="cpu", dtype="float32")
    exact_base.model.double()
    for target in find_targets(tiny.model, WIDE, 4):
        assert target.shape.d_in > calibration.num_tokens
    found, exact = (
        build_basis(base, method="lora_da", rank=4, calibration=calibration, mode="repo", target_modules=WIDE)
        for base in (tiny, exact_base)
    )

    for mine, theirs in zip(found.A, exact.A, strict=True):
        assert chordal(mine, theirs) < 0.05


def test_the_variance_decides_for_one_users_data_in_consistent_units_only(tiny: BaseModel) -> None:
    """Section 8.4 where it matters: 50 examples of one user. Medians measured: 0.39 and 5e-4 of the bias."""
    calibration = jargon(50)
    shares = {}
    for mode in ("consistent", "repo"):
        basis = build_basis(
            tiny, method="lora_da", rank=4, calibration=calibration, mode=mode, target_modules=LAST
        )  # fmt: skip
        shares[mode] = statistics.median(basis.manifest.recipe["notes"]["variance_to_bias"])

    assert shares["consistent"] > 0.1
    assert shares["repo"] < 0.01
