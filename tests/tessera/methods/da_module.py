"""One module with everything LoRA-DA wants to know of it, for its tests."""

from __future__ import annotations

import torch

from tessera.methods.algebra.lora_da_guidance import Fisher, invert_fisher
from tessera.methods.building.activations import SecondMoment
from tessera.methods.building.collected import Counts
from tessera.methods.building.method import ModuleData, ModuleFactors
from tests.tessera.methods.matrices import factorise, module_data, orthonormal, random_matrix

D_OUT, D_IN, RANK = 20, 30, 4
COUNTS = Counts(10, 500, 400, 10, 400)


def make_data(*, seed: int = 0, full: bool = False, counts: Counts = COUNTS, rank: int = RANK) -> ModuleData:
    """A module with correlated inputs and outputs, and a low-rank gradient with noise."""
    x = (
        random_matrix(500, D_IN, seed=seed)
        * torch.linspace(2, 0.1, D_IN)
        @ orthonormal(D_IN, D_IN, seed=seed + 1)
    )
    delta = random_matrix(500, D_OUT, seed=seed + 2) * torch.linspace(1, 0.05, D_OUT)
    rule = SecondMoment(D_IN)
    rule.observe(x, [500])
    Y = delta.T @ delta / 400
    g = random_matrix(D_OUT, 5, seed=seed + 3) @ random_matrix(5, D_IN, seed=seed + 4)
    g = g + 0.1 * random_matrix(D_OUT, D_IN, seed=seed + 5)
    outputs = Y if full else Y.diagonal().clone()
    return module_data(
        torch.zeros(D_OUT, D_IN), rank, gradient=g, inputs=rule, outputs=outputs, counts=counts
    )


def da(data: ModuleData, **options: object) -> ModuleFactors:
    return factorise("lora_da", data, solver="eigh", **options)


def fisher_of(data: ModuleData) -> Fisher:
    rule = data.statistics.inputs
    assert isinstance(rule, SecondMoment)
    return invert_fisher(rule.moment, data.statistics.Y(), damping=1e-3, is_relative=True, name="layer")
