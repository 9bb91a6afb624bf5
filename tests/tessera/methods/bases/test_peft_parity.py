"""Our factors against PEFT 0.21's, on the bundled model, where the definitions agree.

Signs of singular vectors are free, so vectors are compared up to one sign per pair, and products as they
are. PEFT computes in float32, we in float64: what is left is rounding, except for EVA, whose incremental,
randomised PCA only approaches the exact one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from tessera.formats.basis import Basis
from tessera.methods.bases import CalibrationSet, build_basis
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import chordal, text_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANK = 8
TARGETS = [
    f"model.layers.{layer}.{kind}"
    for layer in (0, 1)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
]


def peft_factors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, lora_A [r, d_in], lora_B [d_out, r]) of every adapted module."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            yield name.removeprefix("base_model.model."), A.detach().double(), B.detach().double()


def our_factors(basis: Basis, name: str) -> tuple[Tensor, Tensor]:
    """A' = P_in A and B' = B P_out: the paper's factors with their scales."""
    index = [module.name for module in basis.manifest.modules].index(name)
    A = basis.P_in[index].double() @ basis.A[index].double()
    return A, basis.B[index].double() @ basis.P_out[index].double()


def compare_by_pairs(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], *, tolerance: float) -> None:
    """The product, and every pair of vectors up to one common sign, relative to the largest entry."""
    (A, B), (peft_A, peft_B) = ours, theirs
    product, peft_product = B @ A, peft_B @ peft_A
    scale = float(peft_product.abs().max())
    torch.testing.assert_close(product / scale, peft_product / scale, rtol=0, atol=tolerance)
    signs = torch.sign((A * peft_A).sum(1))
    for mine, other in ((A * signs[:, None], peft_A), (B * signs, peft_B)):
        largest = float(other.abs().max())
        torch.testing.assert_close(mine / largest, other / largest, rtol=0, atol=10 * tolerance)


def lora(model: torch.nn.Module, init: Any, **options: Any) -> torch.nn.Module:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=init, **options
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_b1_b7_weights_only_factors_are_pefts(tiny: BaseModel, method: str) -> None:
    basis = build_basis(tiny, method=method, rank=RANK, target_modules=TARGETS)
    adapted = lora(copy.deepcopy(tiny.model), method)

    compared = 0
    for name, A, B in peft_factors(adapted):
        compare_by_pairs(our_factors(basis, name), (A, B), tolerance=1e-4)
        compared += 1
    assert compared == basis.num_modules == 8


def test_b1_pissas_residual_and_factors_are_the_weight(tiny: BaseModel) -> None:
    """PEFT subtracts s B A from W; we do not touch W. The sum of theirs is ours.

    Theirs is the best rank-r part of some W + E with |E| of a few ε σ_1, which is how good LAPACK is in
    float32. Such an E moves that part by up to |E| (1 + σ_r / (σ_r - σ_r+1)): much where σ_r has a close
    neighbour (0.2 % apart in one of these weights), whatever the seed.
    """
    adapted = lora(copy.deepcopy(tiny.model), "pissa")
    basis = build_basis(tiny, method="pissa", rank=RANK, target_modules=TARGETS)

    for name, _, _ in peft_factors(adapted):
        A, B = our_factors(basis, name)
        residual = adapted.get_submodule(f"base_model.model.{name}").base_layer.weight.detach().double()
        weight = tiny.model.get_submodule(name).weight.double()
        largest, *_, last, next_one = torch.linalg.svdvals(weight)[: RANK + 1].tolist()
        rounding = torch.finfo(torch.float32).eps * largest
        error = float(torch.linalg.matrix_norm(residual + B @ A - weight, 2))
        assert error < 8 * rounding * (1 + last / (last - next_one)), name


def test_b5_corda_factors_are_pefts(tiny: BaseModel, tiny_examples: CalibrationSet) -> None:
    """Theirs inverts C in float32: the rows of A' (which hold C^-1) agree to 5e-3, the columns of B' to 1e-5.

    KPM is compared on other data below: here the last singular values of W C are rounding in float32.
    """
    model = copy.deepcopy(tiny.model)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=TARGETS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )

    def run() -> None:
        for token_ids, _ in tiny_examples.examples:
            model(input_ids=torch.tensor([token_ids]))

    preprocess_corda(model, config, run_model=run)
    adapted = peft.get_peft_model(model, config)
    basis = build_basis(
        tiny, method="corda", rank=RANK, target_modules=TARGETS, calibration=text_of(tiny_examples)
    )

    for name, A, B in peft_factors(adapted):
        ours_A, ours_B = our_factors(basis, name)
        assert chordal(ours_B.T, B.T) < 1e-4
        assert chordal(ours_A, A) < 1e-2
        product = B @ A
        error = torch.linalg.matrix_norm(ours_B @ ours_A - product) / torch.linalg.matrix_norm(product)
        assert float(error) < 1e-2


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_b5_both_modes_of_corda_are_pefts_where_c_is_well_conditioned(
    small: BaseModel, calibration: CalibrationSet, mode: str
) -> None:
    """Inputs in more tokens than dimensions: then the last singular values of W C are no rounding either."""
    model, names = copy.deepcopy(small.model), ["q_proj", "v_proj"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=names,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )

    def run() -> None:
        for token_ids, _ in calibration.examples:
            model(input_ids=torch.tensor([token_ids]))

    preprocess_corda(model, config, run_model=run)
    adapted = peft.get_peft_model(model, config)
    basis = build_basis(
        small, method="corda", rank=4, target_modules=names, calibration=text_of(calibration), mode=mode
    )

    for name, A, B in peft_factors(adapted):
        ours_A, ours_B = our_factors(basis, name)
        assert chordal(ours_B.T, B.T) < 1e-3
        assert chordal(ours_A, A) < 1e-3
        torch.testing.assert_close(ours_B @ ours_A, B @ A, rtol=1e-3, atol=1e-4)


def test_b4_eva_components_are_pefts(tiny: BaseModel, tiny_examples: CalibrationSet) -> None:
    """PEFT's randomised PCA (q = 2 r, niter = 4) comes within 0.11 of the exact space, of √8 at most."""
    model = copy.deepcopy(tiny.model)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.9999, use_label_mask=True),
    )
    longest = max(len(token_ids) for token_ids, _ in tiny_examples.examples)
    ids = torch.zeros(len(tiny_examples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (token_ids, learned) in enumerate(tiny_examples.examples):
        ids[row, : len(token_ids)] = torch.tensor(token_ids)
        mask[row, : len(token_ids)] = 1
        wanted = torch.tensor([False, *learned[1:]])
        labels[row, : len(token_ids)] = torch.where(wanted, torch.tensor(token_ids), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    state = get_eva_state_dict(model, [batch] * 2, config, show_progress_bar=False)

    basis = build_basis(
        tiny, method="eva", rank=RANK, target_modules=TARGETS, calibration=tiny_examples, tokens="label"
    )
    distances = {}
    for index, module in enumerate(basis.manifest.modules):
        components = next(value for key, value in state.items() if module.name in key)
        distances[module.name] = chordal(basis.A[index], components)
    assert max(distances.values()) < 0.15, distances
    names = [module.name for module in basis.manifest.modules]
    q, v = (names.index(f"model.layers.0.self_attn.{kind}_proj") for kind in "qv")
    assert torch.equal(basis.A[q], basis.A[v])


def test_b4_eva_is_pefts_incremental_pca_without_its_randomness(
    tiny: BaseModel, tiny_examples: CalibrationSet
) -> None:
    basis = build_basis(
        tiny, method="eva", rank=RANK, target_modules=TARGETS, calibration=text_of(tiny_examples)
    )
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    linear = tiny.model.get_submodule(name)
    handle = linear.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0]))
    for token_ids, _ in tiny_examples.examples:
        tiny.model(input_ids=torch.tensor([token_ids]))
    handle.remove()
    pca = IncrementalPCA(n_components=64)
    for part in torch.cat(seen).double().split(100):
        pca.partial_fit(part)

    index = [module.name for module in basis.manifest.modules].index(name)
    distance = chordal(basis.A[index], pca.components_[:RANK])
    assert distance < 1e-3, distance
