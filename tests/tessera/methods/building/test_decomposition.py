"""Leading singular triplets of matrices that are too large for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.building import decomposition
from tessera.methods.building.decomposition import Decomposition, check_numerical_rank

RANK = 8


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "MAX_DOUBLE_SIDE", 64)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_leading_triplets_are_those_of_the_exact_svd(shape: tuple[int, int]) -> None:
    X = matrix(*shape, singular_values=torch.arange(1, 201) ** -0.7)

    U, S, Vh = Decomposition().svd(X, RANK, seed=3)
    exact_U, exact_S, exact_Vh = Decomposition("exact").svd(X.double(), RANK, seed=3)

    assert RANK < len(S) < min(shape), "not all of them were computed"
    assert torch.allclose(S[: RANK + 1], exact_S[: RANK + 1].double(), rtol=1e-6)
    assert distance(Vh[:RANK].mT, exact_Vh[:RANK].mT.double()) < 1e-5
    assert distance(U[:, :RANK], exact_U[:, :RANK].double()) < 1e-5
    again = Decomposition().svd(X, RANK, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(again, (U, S, Vh), strict=True))


@pytest.mark.parametrize("max_rounds", [2, 10])
def test_where_they_do_not_converge_the_svd_is_exact(
    monkeypatch: pytest.MonkeyPatch, max_rounds: int
) -> None:
    monkeypatch.setattr(decomposition, "MAX_ROUNDS", max_rounds)
    X = torch.randn(200, 200, generator=torch.Generator().manual_seed(1))

    _, S, _ = Decomposition().svd(X, RANK, seed=0)

    assert torch.allclose(S, torch.linalg.svdvals(X), rtol=1e-4)
    assert len(S) == 200


def test_a_limit_of_memory_holds_for_the_iteration_too() -> None:
    X = matrix(200, 200, singular_values=torch.arange(1, 201) ** -0.7)

    _, S, _ = Decomposition(limit_bytes=1000).svd(X, RANK, seed=0)  # randomised: nothing else fits

    assert S.dtype == torch.float32


@pytest.mark.parametrize("rank", [0, 5])
def test_missing_directions_are_noticed(rank: int) -> None:
    X = matrix(200, 150, singular_values=torch.ones(rank))

    _, S, _ = Decomposition().svd(X, RANK, seed=0)

    with pytest.raises(InvalidInput, match=f"has rank {rank}"):
        check_numerical_rank(S, RANK, "X")


def matrix(num_rows: int, num_columns: int, *, singular_values: Tensor) -> Tensor:
    """Float32 [num_rows, num_columns] with these singular values and random vectors."""
    generator = torch.Generator().manual_seed(0)
    count = len(singular_values)
    U, _ = torch.linalg.qr(torch.randn(num_rows, count, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(num_columns, count, generator=generator, dtype=torch.float64))
    return ((U * singular_values.double()) @ V.mT).float()


def distance(one: Tensor, other: Tensor) -> float:
    """Chordal, between the spaces of orthonormal columns."""
    return float((one @ one.mT - other @ other.mT).norm())
