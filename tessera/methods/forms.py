"""The papers' LoRA forms by name: which factors training begins with, and which of them it moves.

    y = W x + s (B A - B_0 A_0) x          A_0, B_0: the initial factors, if the method takes them off W

W is never written to. A method that trains on the residual W - s B_0 A_0 (PiSSA and its kin) trains the same
function of A and B as this (LoRAM eq. 1), with the frozen product in the forward pass instead of in W.

Conventions, where the papers differ: s = 1 (alpha = r), √r for what its authors train with rsLoRA's alpha /
√r. Learning rates belong to the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.bases import METHODS
from tessera.methods.building.decomposition import random_orthonormal
from tessera.methods.building.hebbian import HebbianConfig
from tessera.methods.options import fill_options

#: LoRA-One's and LoRA-DA's γ: the first product's largest singular value is s / γ.
LORA_ONE_GAMMA, LORA_DA_GAMMA = 128.0, 1024.0


@dataclass(frozen=True)
class Given:
    """What a method of `tessera.methods.bases` has for one module.

    A: [r, d_in], B: [d_out, r], with the paper's own scales; step: [r, r], its first step in these
    coordinates. generator: of this module, preset and seed, on the CPU.
    """

    A: Tensor
    B: Tensor
    step: Tensor | None
    generator: torch.Generator


#: From what a method has to (A_0, B_0).
Initial = Callable[[Given], tuple[Tensor, Tensor]]


def both_factors(given: Given) -> tuple[Tensor, Tensor]:
    return given.A, given.B


def input_factor(given: Given) -> tuple[Tensor, Tensor]:
    """B_0 = 0: the adapter begins as the base model."""
    return given.A, torch.zeros_like(given.B)


def uniform(given: Given) -> tuple[Tensor, Tensor]:
    """LoRA (arXiv 2106.09685), as its authors' code: A ~ U(-1/√d_in, 1/√d_in), B = 0."""
    values = 2 * torch.rand(given.A.shape, generator=given.generator) - 1
    return values / given.A.shape[1] ** 0.5, torch.zeros_like(given.B)


def disjoint_halves(given: Given) -> tuple[Tensor, Tensor]:
    """LoRA-GA's ArB2r: A from the first r of 2 r singular vectors, B from the last r (theorem 3.1)."""
    r = len(given.A) // 2
    return given.A[:r], given.B[:, r:]


def gradient_step(given: Given) -> tuple[Tensor, Tensor]:
    """LoRA-One: B_0 A_0 = -g_r / (σ_max γ), split evenly; `step` is diagonal."""
    assert given.step is not None
    root = (torch.diagonal(given.step) / LORA_ONE_GAMMA).sqrt()
    return given.A * root[:, None], given.B * root


def natural_step(given: Given) -> tuple[Tensor, Tensor]:
    """LoRA-DA: A_0 = A / √γ and B_0 = Δ Aᵀ / √γ, Δ divided by its largest singular value."""
    assert given.step is not None
    return given.A / LORA_DA_GAMMA**0.5, given.B @ given.step / LORA_DA_GAMMA**0.5


def random_directions(kind: str) -> Initial:
    """Random factors of the magnitude that the method gives its own, for LoRAM's ablation (table 4)."""

    def make(given: Given) -> tuple[Tensor, Tensor]:
        A, B = (_random(X, kind, given.generator) for X in (given.A.T, given.B))
        return A.T, B

    return make


def _random(X: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """[d, r] with about the norm of X [d, r]."""
    if kind == "orthogonal":
        Q = random_orthonormal(X.shape[0], X.shape[1], generator).to(X)
    else:
        Q = torch.randn(X.shape, generator=generator) / X.shape[0] ** 0.5
    return Q * float(torch.linalg.matrix_norm(X) / X.shape[1] ** 0.5)


def _one(rank: int) -> float:
    return 1.0


@dataclass(frozen=True)
class LoraPreset:
    """One LoRA form. method: of `tessera.methods.bases`, None for factors that need neither W nor data.

    is_subtracted: B_0 A_0 is taken off, so that training begins at the base model. trains_A: else A is
    frozen. b_rate: the learning rate of B as a multiple of that of A. online: A learns by this local rule
    from the layer's inputs, and not by the gradient. rank_factor: the method is asked for so many times the
    rank.
    """

    name: str
    paper: str
    initial: Initial
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    is_subtracted: bool = False
    trains_A: bool = True
    b_rate: float = 1.0
    scale: Callable[[int], float] = _one
    online: HebbianConfig | None = None
    rank_factor: int = 1

    @property
    def needs_examples(self) -> bool:
        """Whether it starts from data: from those that it trains on, unless others are given."""
        return self.method is not None and METHODS[self.method].needs_calibration != "none"

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises `InvalidInput` for what its method has no option for."""
        known = {} if self.method is None else METHODS[self.method].options
        free = {name: option for name, option in known.items() if name not in self.options}
        fill_options(f"LoRA form {self.name}", free, options)

    def describe(self) -> dict[str, Any]:
        """The form as JSON."""
        return {
            "name": self.name,
            "paper": self.paper,
            "method": self.method,
            "options": {
                name: option.describe()
                for name, option in ({} if self.method is None else METHODS[self.method].options).items()
                if name not in self.options
            },
            "trains": ["A", "B"] if self.trains_A else ["B"],
            "local_rule": None if self.online is None else self.online.rule,
            "needs_examples": self.needs_examples,
            "stored_rank": self.stored_rank(1),
        }

    def stored_rank(self, rank: int) -> int:
        """Of the basis that the trained factors are stored as: B A and -B_0 A_0 side by side, if A moves."""
        return 2 * rank if self.is_subtracted and self.trains_A else rank


def find_preset(name: str) -> LoraPreset:
    """Raises `InvalidInput` naming the known ones."""
    if name not in LORA_PRESETS:
        raise InvalidInput(f"unknown LoRA form {name!r}; known: {', '.join(LORA_PRESETS)}", param="init")
    return LORA_PRESETS[name]


def _split(name: str, paper: str, **options: Any) -> LoraPreset:
    """A method whose two factors are trained on the residual."""
    method = options.pop("method", name)
    return LoraPreset(name, paper, both_factors, method, options, is_subtracted=True)


def _online(name: str, **rule: Any) -> LoraPreset:
    paper = "LoLoRA, algorithm 1 (SNL, AE or SoftHebb for A, the gradient for B)"
    return LoraPreset(name, paper, uniform, trains_A=False, online=HebbianConfig(**rule))


_DA_OPTIONS = {"normalise": True}
_LORAM = "LoRAM (The Primacy of Magnitude in Low-Rank Adaptation)"
_PRESETS = (
    LoraPreset("lora", "LoRA, arXiv 2106.09685", uniform),
    LoraPreset("rslora", "rsLoRA, arXiv 2312.03732: s = α/√r", uniform, scale=math.sqrt),
    LoraPreset("lora_plus", "LoRA+, arXiv 2402.12354: λ = 16", uniform, b_rate=16.0),
    LoraPreset("lora_fa", "LoRA-FA, arXiv 2308.03303: A frozen", uniform, trains_A=False),
    LoraPreset(
        "lora_fa_orthogonal", "LoRA-FA with orthonormal A", input_factor, "random", trains_A=False
    ),
    _split("pissa", "PiSSA, arXiv 2404.02948, eqs 2-3"),
    LoraPreset(
        "pissa_fa", "PiSSA's A, frozen (LoLoRA, table 5)", both_factors, "pissa", is_subtracted=True,
        trains_A=False,
    ),
    _split("milora", "MiLoRA, arXiv 2406.09044, eqs 3-5"),
    _split("olora", "OLoRA, arXiv 2406.01775, algorithm 1"),
    _split("corda", "CorDA (IPM), arXiv 2406.05223, eqs 2-4"),
    LoraPreset(
        "lora_ga", "LoRA-GA, arXiv 2407.05000, theorem 3.1 (ArB2r)", disjoint_halves, "lora_ga",
        is_subtracted=True, rank_factor=2,
    ),
    LoraPreset(
        "lora_one", "LoRA-One, arXiv 2502.01235, algorithm 1, γ = 128", gradient_step, "lora_one",
        scale=math.sqrt,
    ),
    LoraPreset("eva", "EVA, arXiv 2410.07170, without redistribution of ranks", input_factor, "eva",
               {"tokens": "label"}),
    LoraPreset("eva_fa", "EVA's A, frozen (LoLoRA, table 5)", input_factor, "eva", {"tokens": "label"},
               trains_A=False),
    LoraPreset("lora_da", "LoRA-DA, eqs 12-17, γ = 1024", natural_step, "lora_da", _DA_OPTIONS,
               scale=math.sqrt),
    LoraPreset("lora_da_repo", "LoRA-DA, the authors' code", natural_step, "lora_da", {"mode": "repo"},
               scale=math.sqrt),
    LoraPreset("lora_da_fa", "LoRA-DA's A, frozen (table 3)", natural_step, "lora_da", _DA_OPTIONS,
               scale=math.sqrt, trains_A=False),
    *(
        LoraPreset(f"lora_da_{name}", f"LoRA-DA, table 7: {paper}", natural_step, "lora_da",
                   {**_DA_OPTIONS, **options}, scale=math.sqrt)
        for name, paper, options in (
            ("no_bias", "without the bias term", {"use_bias": False}),
            ("no_variance", "without the variance term", {"use_variance": False}),
            ("no_fisher", "without variance and Fisher", {"use_variance": False, "use_fisher": False}),
        )
    ),
    _split("loram", f"{_LORAM}, algorithm 1"),
    _split("loram_pissa", f"{_LORAM}, tracking PiSSA", method="loram", magnitude="tracking"),
    _split("loram_milora", f"{_LORAM}, tracking MiLoRA", method="loram", magnitude="tracking",
           reference="milora"),
    *(
        LoraPreset(f"loram_{kind}", f"{_LORAM}, table 4: {kind} instead of sines", random_directions(kind),
                   "loram", is_subtracted=True)
        for kind in ("orthogonal", "gaussian")
    ),
    _online("lolora"),
    _online("lolora_svd", svd_first=True, lr=1e-4),
    _online("lolora_ae", rule="ae"),
    _online("lolora_softhebb", rule="softhebb"),
    _online("lolora_uncentred", is_centred=False),
)  # fmt: skip
LORA_PRESETS: dict[str, LoraPreset] = {preset.name: preset for preset in _PRESETS}
