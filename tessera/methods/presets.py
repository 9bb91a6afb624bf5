"""The papers' combinations of basis and initialization, by name. Either half may be exchanged for any other.

Learning rates, epochs and schedules are not part of a preset, because they belong to the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method that builds a basis and an initialization, with their options."""

    #: A name of `tessera.methods.bases.METHODS`.
    basis: str
    #: A name of `tessera.methods.init.INIT_METHODS`.
    init: str
    #: The paper, and what the preset takes from it.
    paper: str
    basis_options: Mapping[str, Any] = field(default_factory=dict)
    init_options: Mapping[str, Any] = field(default_factory=dict)
    #: Whether the initialization is meant for a basis that is built from the user's own data.
    own_basis: bool = False
    #: Options of the initialization that only the training knows.
    caller_sets: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the preset as JSON, where the initialization is called `start`."""
        return {
            "basis": self.basis,
            "start": self.init,
            "paper": self.paper,
            "basis_options": dict(self.basis_options),
            "start_options": dict(self.init_options),
            "own_basis": self.own_basis,
            "caller_sets": list(self.caller_sets),
        }


PRESETS: dict[str, Preset] = {
    "lora_xs": Preset("lora_xs", "noise", "LoRA-XS, section 3", init_options={"sigma": 1e-5}),
    "lora_xs_zero": Preset("lora_xs", "zero", "LoRA-XS without the noise: the base model at step 0"),
    "lora_sb": Preset(
        "lora_sb",
        "sb_step",
        "LoRA-SB, algorithm 1 and eq. 5: η is the learning rate",
        init_options={"eta_init": "lr"},
        own_basis=True,
        caller_sets=("learning_rate",),
    ),
    "lora_sb_repo": Preset(
        "lora_sb",
        "sb_step",
        "LoRA-SB, the authors' code: η of the first warm-up step",
        init_options={"eta_init": "first_warmup_step"},
        own_basis=True,
        caller_sets=("learning_rate", "total_steps"),
    ),
    "lora_sb_shared": Preset("lora_sb", "sb_step", "LoRA-SB projected onto a shared basis, η by line search"),
    "lora_da": Preset("lora_da", "da_step", "LoRA-DA in consistent units, step by line search"),
    "lora_da_repo": Preset(
        "lora_da",
        "da_step",
        "LoRA-DA, the authors' code: ΔW_0 = (s / γ) Δ AᵀA, γ = 1024, s = α/√r with α = 16, r = 8",
        basis_options={"mode": "repo", "scale": 16 / 8**0.5},
        init_options={"mode": "repo", "eta_init": "value", "eta": 16 / 8**0.5 / 1024},
        own_basis=True,
    ),
    "lora_da_block": Preset(
        "lora_da",
        "da_step",
        "LoRA-DA, theorem 4.2 as written: the diagonal blocks of K-FAC's inverse, step by line search",
        basis_options={"output_factor": "block"},
        init_options={"output_factor": "block"},
    ),
    "loram": Preset("loram", "zero", "LoRAM, algorithm 1, frozen factors: a control"),
    "lolora": Preset("lolora", "zero", "LoLoRA, algorithm 1, as a basis-building job"),
    "pissa": Preset("pissa", "zero", "PiSSA with frozen factors"),
    "milora": Preset("milora", "zero", "MiLoRA with frozen factors"),
    "olora": Preset("olora", "zero", "OLoRA with frozen factors"),
    "corda": Preset("corda", "zero", "CorDA (IPM) with frozen factors"),
    "eva": Preset("eva", "zero", "EVA's A, B from W·A", basis_options={"tokens": "all"}),
    "lora_ga": Preset("lora_ga", "zero", "LoRA-GA with the same singular vectors on both sides"),
    "lora_one": Preset(
        "lora_one",
        "gradient",
        "LoRA-One, γ = 128",
        init_options={"eta_init": "value", "eta": 1 / 128, "normalise": "spectral"},
        own_basis=True,
    ),
    "gradient_svd": Preset("gradient_svd", "gradient", "the gradient's own basis, step by line search"),
    "population": Preset(
        "population", "population", "a basis and an initialization learned from other users"
    ),
    "random": Preset("random", "zero", "random orthonormal factors, the control"),
    "tinylora": Preset("tinylora", "zero", "TinyLoRA: R from a few trained numbers"),
    "tinylora_thirteen": Preset(
        "tinylora",
        "zero",
        "TinyLoRA with 13 numbers for the whole model",
        basis_options={"num_vectors": 13, "weight_tying": 1.0},
    ),
    "psoft": Preset("psoft", "zero", "PSOFT: rotations of the principal subspace"),
}
