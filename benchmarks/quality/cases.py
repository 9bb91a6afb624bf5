"""The r x r methods by name: how the basis is built, how R is initialized, which learning rates are tried.

All orthonormal bases share one wide sweep, up to 3e-1: their best rate is 3 to 30 times that of a basis with
singular values, and a sweep that ends early turns a learning rate into a verdict on a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tessera.defaults import LLAMA_LINEARS
from tessera.methods.bases import METHODS

#: The rate at which all methods are compared as the papers do, before anybody tunes.
SMALL_RATE = 3e-3
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
#: Of bases whose factors carry singular values of W or magnitudes: their steps are larger at the same rate.
SCALED_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

#: Where an adapter is (LoRA-DA, figure 4).
PLACES = {"attention": LLAMA_LINEARS[:4], "ffn": LLAMA_LINEARS[4:]}
#: How many examples LoRA-SB's basis is built from (LoRA-SB, table 5).
SB_COUNTS = (1, 5, 25, 100, 400)
#: Standard deviations of the noise on ΔW, in steps η (LoRA-SB, table 4).
SB_NOISE = (0.3, 1.0, 3.0, 10.0)
#: How the built basis is changed: none; half of each direction replaced by noise; η S into B and R_0 = I.
Change = Literal["none", "noise", "absorb"]


@dataclass(frozen=True)
class Case:
    """One way to train in r x r form: a basis, an initialization and the learning rates to try."""

    name: str
    #: The method of `build_basis`, with its options.
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    #: The method of `make_init`, with its options.
    init: str = "zero"
    init_options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = RATES
    #: Whether the basis depends on the seed, so that every seed builds its own.
    is_random: bool = False
    #: Whether the initialization's η is the learning rate.
    lr_init: bool = False
    change: Change = "none"
    target_modules: tuple[str, ...] = LLAMA_LINEARS

    @property
    def needs_data(self) -> bool:
        return METHODS[self.method].needs_calibration != "none"


def _xs(name: str, vectors: str, *, with_sigma: bool, is_random: bool = False) -> Case:
    rates = SCALED_RATES if with_sigma and vectors != "random" else RATES
    options = {"vectors": vectors, "with_sigma": with_sigma}
    return Case(name, "lora_xs", options, rates=rates, is_random=is_random)


def _sb(name: str, *, init: str = "sb_step", change: Change = "none", **options: Any) -> Case:
    """Return a case of LoRA-SB, initialized by line search unless another initialization is named."""
    return Case(name, "lora_sb", options, init=init, change=change)


def _da(name: str, **options: Any) -> Case:
    shared = {"mode", "form", "output_factor", "use_fisher", "damping", "damping_mode", "normalise"}
    shared &= set(options)
    return Case(name, "lora_da", options, "da_step", {key: options[key] for key in shared})


_CASES = (
    _xs("lora_xs", "top", with_sigma=True),
    _xs("lora_xs_orth", "top", with_sigma=False),
    _xs("lora_xs_middle_orth", "middle", with_sigma=False),
    _xs("lora_xs_bottom", "bottom", with_sigma=True),
    _xs("lora_xs_bottom_orth", "bottom", with_sigma=False),
    _xs("xs_random", "random", with_sigma=False, is_random=True),
    _xs("xs_svd_of_random", "svd_of_random", with_sigma=True, is_random=True),
    Case("random", "random", is_random=True),
    Case("loram", "loram", rates=SCALED_RATES),
    Case("loram_orth", "loram", {"rule": "none"}),
    Case("pissa", "pissa", rates=SCALED_RATES),
    Case("milora", "milora", rates=RATES),
    Case("olora", "olora", rates=SCALED_RATES),
    Case("corda", "corda", rates=SCALED_RATES),
    Case("eva", "eva"),
    Case("eva_grad", "eva", {"output_rule": "grad"}),
    Case("lolora", "lolora"),
    Case("lora_ga", "lora_ga"),
    Case("lora_one", "lora_one", init="gradient", init_options={"normalise": "spectral"}),
    Case("gradient_svd", "gradient_svd"),
    _sb("lora_sb"),
    _sb("lora_sb_zero", init="zero"),
    Case("lora_sb_paper", "lora_sb", init="sb_step", lr_init=True),
    _sb("sb_noise", init="zero", change="noise"),
    _sb("sb_usv", change="absorb"),
    *(_sb(f"sb_noise_{level:g}", noise=level) for level in SB_NOISE),
    *(_sb(f"lora_sb_n{count}", init="zero", num_examples=count) for count in SB_COUNTS),
    _da("lora_da"),
    Case("lora_da_zero", "lora_da"),
    _da("lora_da_no_bias", use_bias=False),
    _da("lora_da_no_variance", use_variance=False),
    _da("lora_da_no_fisher", use_variance=False, use_fisher=False),
    _da("lora_da_repo", mode="repo"),
    # The authors' units alone: of few tokens the factors are so singular that their absolute damping makes
    # another method of it, and a normalised step is another initialization.
    _da("lora_da_repo_units", mode="repo", damping=1e-3, damping_mode="relative", normalise=False),
    _da("lora_da_two_sided", form="two_sided"),
    # What K-FAC's output factor keeps: theorem 4.2's diagonal of the inverse, or the whole factor.
    *(
        _da(f"lora_da_{factor}{name}", output_factor=factor, **options)
        for factor in ("block", "full")
        for name, options in (("", {}), ("_damped", {"damping": 1e-1}))
    ),
    _da("lora_da_damped", damping=1e-1),
    *(_da(f"lora_da_n{count}", num_examples=count) for count in (16, 64, 1024)),
    *(
        Case(f"lora_da_{place}", "lora_da", init="da_step", target_modules=names)
        for place, names in PLACES.items()
    ),
    *(
        Case(f"random_{place}", "random", is_random=True, target_modules=names)
        for place, names in PLACES.items()
    ),
)
CASES: dict[str, Case] = {case.name: case for case in _CASES}
