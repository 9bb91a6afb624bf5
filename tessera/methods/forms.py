"""The papers' LoRA forms by name: how A and B are initialized, and which of them are trained.

    y = W x + s (B A - B_0 A_0) x          A_0, B_0: the initial factors, if the method subtracts them from W

W is never written to. A method that trains on the residual W - s B_0 A_0 (such as PiSSA) trains the same
function of A and B as this (LoRAM, arXiv 2507.06558, eq. 1), with the frozen product in the forward pass
instead of in W.

Where the papers differ, s = 1 (alpha = r), and s = √r for methods that the authors train with rsLoRA's alpha
/ √r. Learning rates belong to the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.bases import METHODS
from tessera.methods.building.decomposition import random_orthonormal
from tessera.methods.building.hebbian import HebbianConfig
from tessera.methods.options import Option, fill_options

#: γ of LoRA-One and of LoRA-DA; the largest singular value of s B_0 A_0 is s / γ.
LORA_ONE_GAMMA, LORA_DA_GAMMA = 128.0, 1024.0
#: The option of forms in which a local rule trains A.
A_LEARNING_RATE = "a_learning_rate"


@dataclass(frozen=True)
class Given:
    """The factors that a method of `tessera.methods.bases` computed for one module."""

    #: A' [r, d_in], with the paper's own scale.
    A: Tensor
    #: B' [d_out, r], with the paper's own scale.
    B: Tensor
    #: [r, r], the method's first step in these coordinates.
    step: Tensor | None
    #: On the CPU; differs between modules, presets and seeds.
    generator: torch.Generator


#: Computes (A_0, B_0) from what the method gave.
Initial = Callable[[Given], tuple[Tensor, Tensor]]


def both_factors(given: Given) -> tuple[Tensor, Tensor]:
    """A_0 = A' and B_0 = B'."""
    return given.A, given.B


def input_factor(given: Given) -> tuple[Tensor, Tensor]:
    """A_0 = A' and B_0 = 0, so that training begins at the base model."""
    return given.A, torch.zeros_like(given.B)


def uniform(given: Given) -> tuple[Tensor, Tensor]:
    """A_0 ~ U(-1/√d_in, 1/√d_in), B_0 = 0, as in the code of LoRA (arXiv 2106.09685)."""
    values = 2 * torch.rand(given.A.shape, generator=given.generator) - 1
    return values / given.A.shape[1] ** 0.5, torch.zeros_like(given.B)


def disjoint_halves(given: Given) -> tuple[Tensor, Tensor]:
    """LoRA-GA's ArB2r: A_0 from the first r of 2 r singular vectors, B_0 from the last r (theorem 3.1)."""
    r = len(given.A) // 2
    return given.A[:r], given.B[:, r:]


def gradient_step(given: Given) -> tuple[Tensor, Tensor]:
    """LoRA-One: B_0 A_0 = -g_r / (σ_max γ), split evenly. `step` is diagonal."""
    assert given.step is not None
    root = (torch.diagonal(given.step) / LORA_ONE_GAMMA).sqrt()
    return given.A * root[:, None], given.B * root


def natural_step(given: Given) -> tuple[Tensor, Tensor]:
    """LoRA-DA: A_0 = A / √γ and B_0 = Δ Aᵀ / √γ, where Δ is divided by its largest singular value."""
    assert given.step is not None
    return given.A / LORA_DA_GAMMA**0.5, given.B @ given.step / LORA_DA_GAMMA**0.5


def random_directions(kind: str) -> Initial:
    """Return an initialization with random factors of the method's magnitude (LoRAM's ablation, table 4)."""

    def make(given: Given) -> tuple[Tensor, Tensor]:
        A, B = (_random(X, kind, given.generator) for X in (given.A.T, given.B))
        return A.T, B

    return make


def _random(X: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Draw a matrix [d, r] with about the norm of X [d, r]. kind: "orthogonal" or "gaussian"."""
    if kind == "orthogonal":
        Q = random_orthonormal(X.shape[0], X.shape[1], generator).to(X)
    else:
        Q = torch.randn(X.shape, generator=generator) / X.shape[0] ** 0.5
    return Q * float(torch.linalg.matrix_norm(X) / X.shape[1] ** 0.5)


def _one(rank: int) -> float:
    return 1.0


@dataclass(frozen=True)
class LoraPreset:
    """One LoRA form."""

    name: str
    #: The paper, and what the form takes from it.
    paper: str
    initial: Initial
    #: A name of `tessera.methods.bases.METHODS`; None: the factors need neither W nor data.
    method: str | None = None
    #: Options of the method that the form sets.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Whether B_0 A_0 is subtracted, so that training begins at the base model.
    is_subtracted: bool = False
    #: Whether A is trained, or else frozen.
    trains_A: bool = True
    #: The learning rate of B, as a multiple of that of A.
    b_rate: float = 1.0
    #: s for a rank.
    scale: Callable[[int], float] = _one
    #: The local rule by which A learns from the layer's inputs; None: A does not learn in that way.
    online: HebbianConfig | None = None
    #: The rank for which the method is called, as a multiple of the form's.
    rank_factor: int = 1

    @property
    def own_options(self) -> dict[str, Option]:
        """The options of the form itself, beside those of its method."""
        if self.online is None:
            return {}
        return {
            A_LEARNING_RATE: Option(
                self.online.lr,
                "Adam's learning rate for A, which the local rule trains; the job's learning rate is B's",
                minimum=1e-12,
            )
        }

    @property
    def free_options(self) -> dict[str, Option]:
        """The options that a caller may set: the form's own, and those of its method."""
        known = {} if self.method is None else METHODS[self.method].options
        return self.own_options | {name: known[name] for name in known if name not in self.options}

    def needs_examples(self, options: Mapping[str, Any]) -> bool:
        """Return whether it is initialized from data: the training examples, unless others are given."""
        if self.method is None:
            return False
        method = METHODS[self.method]
        filled = fill_options(method.name, method.options, self.method_options(options))
        return method.needs(1, filled).any

    def method_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options for the method: the given ones without the form's own, and those it sets."""
        given = {name: value for name, value in options.items() if name not in self.own_options}
        return {**given, **self.options}

    def local_rule(self, options: Mapping[str, Any]) -> HebbianConfig | None:
        """Return the rule by which A learns from the layer's inputs, at the rate of the options, if any."""
        if self.online is None:
            return None
        option = self.own_options[A_LEARNING_RATE]
        rate = option.check(A_LEARNING_RATE, options.get(A_LEARNING_RATE, option.default))
        return replace(self.online, lr=rate)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise `InvalidInput` for options that the form does not have."""
        fill_options(f"LoRA form {self.name}", self.free_options, options)

    def describe(self) -> dict[str, Any]:
        """Return the form as JSON."""
        return {
            "name": self.name,
            "paper": self.paper,
            "method": self.method,
            "options": {name: option.describe() for name, option in self.free_options.items()},
            "fixed_options": dict(self.options),
            "trains": ["A", "B"] if self.trains_A else ["B"],
            "local_rule": None if self.online is None else self.online.rule,
            "needs_examples": self.needs_examples({}),
            "stored_rank": self.stored_rank(1),
        }

    def stored_rank(self, rank: int) -> int:
        """Return the rank of the stored basis, which holds B A and -B_0 A_0 side by side if A is trained."""
        return 2 * rank if self.is_subtracted and self.trains_A else rank


def find_preset(name: str) -> LoraPreset:
    """Return the form of this name. Raises `InvalidInput`, which lists the known names."""
    if name not in LORA_PRESETS:
        raise InvalidInput(f"unknown LoRA form {name!r}; known: {', '.join(LORA_PRESETS)}", param="init")
    return LORA_PRESETS[name]


def _split(name: str, paper: str, **options: Any) -> LoraPreset:
    """Return the form of a method that trains both factors on the residual."""
    method = options.pop("method", name)
    return LoraPreset(name, paper, both_factors, method, options, is_subtracted=True)


def _tracking(name: str, reference: str) -> LoraPreset:
    """Return LoRAM at the magnitude of another method."""
    paper = f"{_LORAM}, section 4.3, tracking {name}"
    return _split(f"loram_{reference}", paper, method="loram", magnitude="tracking", reference=reference)


def _online(name: str, **rule: Any) -> LoraPreset:
    """Return a form in which A learns by a local rule and B by the gradient."""
    paper = "LoLoRA, algorithm 1 (SNL, AE or SoftHebb for A, the gradient for B)"
    return LoraPreset(name, paper, uniform, trains_A=False, online=HebbianConfig(**rule))


_DA_OPTIONS = {"normalise": True}
_LORAM = "LoRAM, arXiv 2507.06558"
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
        "lora_ga_rslora", "LoRA-GA with rsLoRA's s = √r (LoRAM, table 4)", disjoint_halves, "lora_ga",
        is_subtracted=True, rank_factor=2, scale=math.sqrt,
    ),
    LoraPreset(
        "lora_one", "LoRA-One, arXiv 2502.01235, algorithm 1, γ = 128", gradient_step, "lora_one",
        scale=math.sqrt,
    ),
    LoraPreset("eva", "EVA, arXiv 2410.07170, without redistribution of ranks", input_factor, "eva",
               {"tokens": "label"}),
    LoraPreset("eva_fa", "EVA's A, frozen (LoLoRA, table 5)", input_factor, "eva", {"tokens": "label"},
               trains_A=False),
    LoraPreset("lora_da", "LoRA-DA, arXiv 2510.24561, eqs 12-17, γ = 1024", natural_step, "lora_da",
               _DA_OPTIONS, scale=math.sqrt),
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
    LoraPreset("loram_rslora", f"{_LORAM}, sections 4.3 and table 4, with rsLoRA's s = √r", both_factors,
               "loram", is_subtracted=True, scale=math.sqrt),
    *(_tracking(paper, name) for name, paper in (
        ("pissa", "PiSSA"), ("milora", "MiLoRA"), ("corda", "CorDA"), ("lora_ga", "LoRA-GA"))),
    *(
        LoraPreset(f"loram_{kind}", f"{_LORAM}, table 4: {kind} instead of sines", random_directions(kind),
                   "loram", is_subtracted=True)
        for kind in ("orthogonal", "gaussian")
    ),
    _online("lolora"),
    _online("lolora_svd", svd_first=True, lr=1e-4),
    LoraPreset("lolora_eva", "LoLoRA, table 4: A initialized by EVA, then learned by SNL", input_factor,
               "eva", trains_A=False, online=HebbianConfig()),
    _online("lolora_ae", rule="ae"),
    _online("lolora_softhebb", rule="softhebb"),
    _online("lolora_softhebb_plain", rule="softhebb_plain"),
    _online("lolora_uncentred", is_centred=False),
)  # fmt: skip
LORA_PRESETS: dict[str, LoraPreset] = {preset.name: preset for preset in _PRESETS}
