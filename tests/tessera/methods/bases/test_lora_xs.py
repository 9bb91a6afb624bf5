"""LoRA-XS (methods catalogue XS1 to XS4)."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.errors import InvalidInput
from tessera.methods.bases import build_basis
from tessera.methods.building.losses import attached
from tessera.methods.init import make_init
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import decaying_matrix, factorise, module_data, random_matrix, svd_rank

TOKENS = torch.tensor([[5, 17, 44, 3, 80, 22, 9]])


def test_xs1_the_product_is_the_truncation_of_the_weight() -> None:
    W = decaying_matrix(20, 30)
    found = factorise("lora_xs", module_data(W, 6))

    torch.testing.assert_close(found.B @ found.A, svd_rank(W, 6), rtol=0, atol=1e-10)
    left = (W - found.B @ found.A).square().sum()
    values = torch.linalg.svdvals(W)
    torch.testing.assert_close(left, values[6:].square().sum(), rtol=1e-10, atol=0)
    assert found.notes["relative_gap"] == pytest.approx(float(1 - values[6] / values[5]), abs=1e-9)


def test_xs2_singular_values_are_on_the_input_side() -> None:
    W = decaying_matrix(20, 30)
    found = factorise("lora_xs", module_data(W, 6))

    values = torch.linalg.svdvals(W)[:6]
    torch.testing.assert_close(torch.linalg.vector_norm(found.A, dim=1), values, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.B.T @ found.B, torch.eye(6).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(W @ found.A.T, found.B * values**2, rtol=0, atol=1e-10)


def test_xs2_the_preconditioner_holds_the_singular_values(small: BaseModel) -> None:
    basis = build_basis(small, rank=4, scale=0.5)
    plain = build_basis(small, rank=4, with_sigma=False)

    for index, module in enumerate(basis.manifest.modules):
        values = torch.linalg.svdvals(small.model.get_submodule(module.name).weight.double())[:4]
        torch.testing.assert_close(basis.P_in[index].double(), torch.diag(values), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(basis.P_out[index], 0.5 * torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(plain.P_in[index], torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(plain.A[index], basis.A[index], rtol=0, atol=1e-5)


def test_xs3_noise_is_small_and_zero_is_the_base_model(small: BaseModel) -> None:
    basis = build_basis(small, rank=4, scale=2.0)
    noise = make_init(basis, method="noise", seed=3)
    served = basis.fold(noise)

    for index in range(basis.num_modules):
        bound = 2.0 * 1e-5 * float(basis.P_in[index].max()) * 2 * math.sqrt(4)
        assert 0 < float(torch.linalg.matrix_norm(served[index], ord=2)) < 1.2 * bound
    assert noise.std() == pytest.approx(1e-5, rel=0.2)
    assert torch.equal(noise, make_init(basis, method="noise", seed=3))

    plain = small.model(TOKENS).logits
    zero = basis.fold(make_init(basis, method="zero"))
    with attached(small, basis, zero):
        assert torch.equal(small.model(TOKENS).logits, plain)
    with attached(small, basis, served):
        assert 0 < (small.model(TOKENS).logits - plain).abs().max() < 1e-2


@pytest.mark.parametrize("with_sigma", [True, False])
@pytest.mark.parametrize(("vectors", "first"), [("top", 0), ("middle", 7), ("bottom", 14)])
def test_xs4_selects_singular_vectors(vectors: str, first: int, with_sigma: bool) -> None:
    W = decaying_matrix(20, 30)
    found = factorise("lora_xs", module_data(W, 6), vectors=vectors, with_sigma=with_sigma)

    values = torch.linalg.svdvals(W)[first : first + 6]
    torch.testing.assert_close(found.B.T @ W @ found.A.T, torch.diag(values ** (2 if with_sigma else 1)))
    expected = values if with_sigma else torch.ones(6).double()
    torch.testing.assert_close(torch.linalg.vector_norm(found.A, dim=1), expected)


def test_xs4_random_factors_have_the_authors_scales() -> None:
    data = module_data(random_matrix(400, 300), 16)
    found = factorise("lora_xs", data, vectors="random")

    for factor, width in ((found.A, 16), (found.B, 400)):
        limit = 1 / math.sqrt(width)
        assert 0.99 * limit < float(factor.abs().max()) <= limit
        assert float(factor.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)
    rows = torch.linalg.vector_norm(found.A, dim=1)
    assert float(rows.mean()) == pytest.approx(math.sqrt(300 / (3 * 16)), rel=0.05)


def test_xs4_svd_of_random_has_nothing_of_the_weight() -> None:
    W = decaying_matrix(20, 30)
    data = module_data(W, 6)
    found = factorise("lora_xs", data, vectors="svd_of_random")
    other_weight = factorise("lora_xs", module_data(2 * W, 6), vectors="svd_of_random")
    other_seed = factorise("lora_xs", module_data(W, 6, seed=1), vectors="svd_of_random")

    torch.testing.assert_close(found.B.T @ found.B, torch.eye(6).double())
    assert torch.equal(found.A, other_weight.A)
    assert not torch.allclose(found.A, other_seed.A)
    assert (found.A.diff(dim=0).abs().sum(1) > 0).all()


def test_xs_randomised_svd_is_close_and_reproducible() -> None:
    W = decaying_matrix(96, 128, power=0.3)
    exact = factorise("lora_xs", module_data(W, 8))
    state = torch.random.get_rng_state()

    quick = [build_one(W, seed=1) for _ in range(2)]

    assert torch.equal(quick[0], quick[1])
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator must not move"
    best = torch.linalg.matrix_norm(W - exact.B @ exact.A)
    assert float(torch.linalg.matrix_norm(W - quick[0]) / best) < 1 + 1e-3


def build_one(W: torch.Tensor, *, seed: int) -> torch.Tensor:
    from tessera.methods.building.decomposition import Decomposition

    U, S, Vh = Decomposition("randomised").svd(W, 8, seed=seed)
    return (U[:, :8] * S[:8] @ Vh[:8]).double()


def test_xs_vectors_of_a_null_space_are_refused() -> None:
    W = svd_rank(decaying_matrix(20, 30), 10)
    with pytest.raises(InvalidInput, match=r"weight of layer has rank 10"):
        factorise("lora_xs", module_data(W, 4), vectors="bottom")
    factorise("lora_xs", module_data(W, 4))
