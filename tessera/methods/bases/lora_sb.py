"""LoRA-SB (arXiv 2411.19557): the first step of full fine-tuning, as basis and initialization.

    G  = Σ_i ∇_W L(W, x_i)                     summed over a small part of the data      (algorithm 1)
    ΔW = -η sign(G)                            AdamW's first step is g / (√g² + ε)       (eq. 5, appendix C)
    U S Vᵀ = SVD(ΔW),   B = U_r,   A = V_rᵀ,   R_0 = diag(S_r) / s                       (eqs 6 to 8)

Needs labelled examples. B carries the minus sign, so S is not negative. `step` is diag(S_r) for η = 1; an
initialization is η times that. With s = 1 and orthonormal factors, the gradient of R is the optimal one of
theorem 3, g_R/s² (BᵀB)^-1 (AAᵀ)^-1.

Table 4 repeats the SVD with noise on ΔW, "varying levels" of it, to show that the subspace matters and not
only its orthonormality: option `noise`, in units of η. (Its other row, the SVD of a random matrix, is
`lora_xs` with vectors="svd_of_random".)

How long the step is decides the paper's "lower initial loss". The paper calls η the learning rate, while the
authors' code sets it to the rate of the first *warm-up* step (3e-7 for MetaMath); see `init/step_size.py`.

The paper reads 0.1 % of the examples and sees a plateau above 25 of them, each of 300 tokens. Tokens decide,
not examples, so our floor counts tokens to learn. Measured at rank 8: the basis catches .08 / .17 / .28 / .36
/ .47 of a fresh gradient's energy when it is built from 1 / 4 / 16 / 64 / 256 sequences of 96 bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.decomposition import module_seed
from tessera.methods.building.gradient_space import gradient_needs, gradient_triplets
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Option, Options

#: About as many tokens to learn as 50 examples of MetaMath have.
MIN_LABEL_TOKENS = 10_000
#: The options of ΔW.
UPDATE_OPTIONS = {
    "soft_sign": Option(0.0, "ε of g / (|g| + ε); 0 gives the paper's sign", minimum=0.0),
    "noise": Option(
        0.0,
        "standard deviation of Gaussian noise on every entry of ΔW, as a multiple of η (an entry is ± η)",
        minimum=0.0,
    ),
}


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A [r, d_in], B [d_out, r], orthonormal, and the step diag(S_r).

    B (η step) A approximates -η sign(G).
    """
    update = update_direction(data.statistics.take_gradient(), soft_sign=options["soft_sign"])
    direction = add_noise(update, data.shape.name, options)
    U, S, Vh, gap = gradient_triplets(direction, data)
    return ModuleFactors(Vh, U, torch.diag(S), {"relative_gap": gap})


def update_direction(G: Tensor, *, soft_sign: float = 0.0) -> Tensor:
    """Return AdamW's first step for a learning rate of one: -G / (|G| + soft_sign), or -sign(G) for 0.

    Where |g| is near Adam's ε (1e-8), the sign overstates the step; soft_sign=1e-8 is what Adam does.
    """
    if soft_sign:
        return -G / (G.abs() + soft_sign)
    return torch.sign(G).neg_()


def add_noise(update: Tensor, name: str, options: Options) -> Tensor:
    """Return the update [d_out, d_in] of module `name` plus Gaussian noise, which may overwrite it.

    The noise depends on the seed, the module and nothing else, so that the basis and a step that is projected
    onto it later have the same.
    """
    if not options["noise"]:
        return update
    generator = torch.Generator().manual_seed(module_seed(options["seed"], "lora_sb/noise", name, 0))
    noise = torch.randn(update.shape, generator=generator)
    return update.add_(noise.to(update), alpha=options["noise"])


def select(calibration: CalibrationSet, options: Options) -> CalibrationSet:
    """Draw `num_examples` at random, or else a `share` of them that has at least `min_label_tokens`."""
    if options["num_examples"]:
        return calibration.take(options["num_examples"], seed=options["seed"])
    count = max(1, math.ceil(options["share"] * len(calibration)))
    return calibration.take(count, seed=options["seed"], min_label_tokens=options["min_label_tokens"])


METHOD = Method(
    name="lora_sb",
    description="The first step of full fine-tuning on labelled examples: the sign of their summed gradient",
    paper="LoRA-SB, arXiv 2411.19557, algorithm 1",
    factorise=factorise,
    needs_calibration="labelled",
    options={
        **DATA_OPTIONS,
        "share": Option(0.001, "share of the calibration examples that is used", minimum=0.0, maximum=1.0),
        "min_label_tokens": Option(
            MIN_LABEL_TOKENS,
            "use more examples than share until they have this many tokens to learn",
            minimum=0,
        ),
        **UPDATE_OPTIONS,
    },
    needs=gradient_needs,
    select=select,
)
