"""The magnitudes of other methods' factors, which LoRAM may track (arXiv 2507.06558, section 4.3, table 4).

    product   ‖B_ref A_ref‖_F²        the paper's ν[B_ref A_ref] times the number of entries
    A, B      ‖A_ref‖_F², ‖B_ref‖_F²  what eq. 6 makes of the factors, k_1 = r (d_in ν[A]² + d_out ν[B]²)

PiSSA, MiLoRA and OLoRA are decompositions of the weight. CorDA's weighs it by the inputs' covariance and
needs text. LoRA-GA's factors are singular vectors times the constant c = d_out^¼ / √γ, so its magnitude
depends on the shape alone, and tracking it needs no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.methods.bases import corda, lora_ga
from tessera.methods.bases.lora_xs import singular_triplets
from tessera.methods.building.collected import Needs
from tessera.methods.building.method import ModuleData
from tessera.methods.options import fill_options


@dataclass(frozen=True)
class Magnitude:
    """The squared Frobenius norms of a method's factors and of their product."""

    A: float
    B: float
    product: float

    @classmethod
    def of_spectrum(cls, s: Tensor) -> Magnitude:
        """Return that of A = √S Vᵀ and B = U √S."""
        total = float(s.sum())
        return cls(total, total, float(s.square().sum()))


def of_pissa(data: ModuleData) -> Magnitude:
    return Magnitude.of_spectrum(singular_triplets(data.weight, data, which="top")[1])


def of_milora(data: ModuleData) -> Magnitude:
    return Magnitude.of_spectrum(singular_triplets(data.weight, data, which="bottom")[1])


def of_olora(data: ModuleData) -> Magnitude:
    """A = R[:r] and B = Q[:, :r] of W = Q R; B is orthonormal."""
    square = float(torch.linalg.qr(data.weight.double())[1][: data.rank].square().sum())
    return Magnitude(square, float(data.rank), square)


def of_corda(data: ModuleData) -> Magnitude:
    """The factors of `corda.py` with its default options. Needs the statistics of `corda.needs`."""
    factors = corda.factorise(data, fill_options("corda", corda.METHOD.options, {}))
    A, B = factors.A.double(), factors.B.double()
    return Magnitude(float(A.square().sum()), float(B.square().sum()), float((B @ A).square().sum()))


def of_lora_ga(data: ModuleData) -> Magnitude:
    """The factors c V[:r]ᵀ and c U[r:2r] of the authors' code at their γ = 16."""
    gamma = lora_ga.METHOD.options["gamma"].default
    assert isinstance(gamma, float)
    square = lora_ga.stable_scale(data.shape.d_out, gamma) ** 2
    return Magnitude(square * data.rank, square * data.rank, square**2 * data.rank)


REFERENCES: Mapping[str, Callable[[ModuleData], Magnitude]] = {
    "pissa": of_pissa,
    "milora": of_milora,
    "olora": of_olora,
    "corda": of_corda,
    "lora_ga": of_lora_ga,
}


def needs_of(reference: str, rank: int) -> Needs:
    """Return the statistics that a reference needs."""
    return corda.needs(rank, {}) if reference == "corda" else Needs()
