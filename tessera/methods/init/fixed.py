"""Initializations that need no data: zero, noise, what a population has in common, and another adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessera.errors import BasisMismatch, InvalidInput
from tessera.methods.building.rebasing import rebase
from tessera.methods.init.method import InitInputs, InitMethod
from tessera.methods.options import Option, Options


def zero(request: InitInputs, options: Options) -> tuple[Tensor, dict[str, Any]]:
    """R_0 = 0, the base model bit for bit. It trains: ∂L/∂R = P_outᵀ Bᵀ g Aᵀ P_inᵀ is not zero there."""
    basis = request.basis
    return torch.zeros(basis.num_modules, basis.rank, basis.rank), {}


def noise(request: InitInputs, options: Options) -> tuple[Tensor, dict[str, Any]]:
    """R_0 ~ N(0, σ²) (LoRA-XS, section 3), with ‖ΔW‖ <= about 2 √r σ σ_1. There is no symmetry to break."""
    basis = request.basis
    generator = torch.Generator().manual_seed(options["seed"])
    shape = (basis.num_modules, basis.rank, basis.rank)
    return options["sigma"] * torch.randn(shape, generator=generator), {}


def population(request: InitInputs, options: Options) -> tuple[Tensor, dict[str, Any]]:
    """R_0 = P_out^-1 S P_in^-1, where S is the initialization that was learned with the basis."""
    basis = request.basis
    if basis.start is None:
        raise InvalidInput(
            f"basis {basis.basis_id} ({basis.manifest.method}) has no initialization of its own", param="init"
        )
    return basis.unfold(basis.start.double()), {}


def warm(request: InitInputs, options: Options) -> tuple[Tensor, dict[str, Any]]:
    """R_0 = P_out^-1 R P_in^-1 of an adapter, which is first moved to this basis if it belongs to another."""
    basis, adapter = request.basis, request.adapter
    if adapter is None:
        raise InvalidInput("initialization 'warm' needs an adapter to continue from", param="init")
    loss = 0.0
    if adapter.basis_id != basis.basis_id:
        if request.adapter_basis is None:
            raise BasisMismatch(
                f"the adapter belongs to basis {adapter.basis_id}, which is needed to move it"
            )
        adapter, loss = rebase(adapter, request.adapter_basis, basis)
        if loss > options["max_relative_loss"]:
            raise InvalidInput(
                f"moving the adapter to another basis loses {loss:.1%} of it; "
                f"{options['max_relative_loss']:.1%} is allowed",
                param="max_relative_loss",
            )
    if not basis.cores.is_free:
        loss = max(loss, basis.cores.relative_loss(adapter.R))
        if loss > options["max_relative_loss"]:
            raise InvalidInput(
                f"the numbers that are trained in this basis cannot express {loss:.1%} of the adapter; "
                f"{options['max_relative_loss']:.1%} is allowed",
                param="max_relative_loss",
            )
    return basis.unfold(adapter.R.double()), {"relative_loss": loss}


ZERO = InitMethod(
    name="zero",
    description="Zero: training begins at the base model",
    paper="the same as training on W - B_0 A_0 in PiSSA and LoRAM",
    make=zero,
)
NOISE = InitMethod(
    name="noise",
    description="Gaussian noise",
    paper="LoRA-XS, arXiv 2405.17604, section 3",
    make=noise,
    options={
        "sigma": Option(1e-5, "standard deviation in trained coordinates", minimum=0.0),
        "seed": Option(0, "seed of the noise"),
    },
)
POPULATION = InitMethod(
    name="population",
    description="The R that the users of a learned basis have in common",
    paper="Reptile, arXiv 1803.02999",
    make=population,
)
WARM = InitMethod(
    name="warm",
    description="Another adapter, moved to this basis",
    paper="",
    make=warm,
    needs_adapter=True,
    options={
        "max_relative_loss": Option(
            0.5,
            "refuse an adapter that loses more than this share of ‖ΔW‖² by moving",
            minimum=0.0,
            maximum=1.0,
        ),
    },
)
