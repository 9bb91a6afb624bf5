"""LoRA-SB (arXiv 2411.19557): the first step of full fine-tuning, as basis and as start.

    G  = Σ_i ∇_W L(W, x_i)                       summed over a small part of the data    (algorithm 1)
    ΔW = -η sign(G)                              AdamW's first step is g / (√g² + ε)      (eq. 5, appendix C)
    U S Vᵀ = SVD(ΔW),   B = U_r,   A = V_rᵀ,   R_0 = diag(S_r) / s                        (eqs 6 to 8)

The minus sign lives in B: S is not negative. `step` is diag(S_r) for η = 1, so a start is η times it. With
s = 1 and orthonormal factors the gradient of R is the optimal one of theorem 3, g_R/s² (BᵀB)^-1 (AAᵀ)^-1.

What decides the paper's "lower initial loss" is η, which the paper calls the learning rate and the authors'
code sets to that of the first *warm-up* step (3e-7 for MetaMath). See `starts`.

How much data: the paper takes 0.1 % of the examples and sees a plateau above 25 of them, of 300 tokens.
What decides is tokens, so the floor counts tokens to learn (measured with rank 8: the share of a fresh
gradient's energy that the basis catches is .08 / .17 / .28 / .36 / .47 from 1 / 4 / 16 / 64 / 256 sequences
of 96 bytes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.gradient_svd import gradient_needs, gradient_triplets
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Option, Options

#: 50 examples of MetaMath have about as many tokens to learn.
MIN_LABEL_TOKENS = 10_000


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A [r, d_in], B [d_out, r] orthonormal; step: diag(S_r): B (η step) A approximates -η sign(G)."""
    direction = update_direction(data.statistics.take_gradient(), soft_sign=options["soft_sign"])
    U, S, Vh, gap = gradient_triplets(direction, data)
    return ModuleFactors(Vh, U, torch.diag(S), {"relative_gap": gap})


def update_direction(G: Tensor, *, soft_sign: float = 0.0) -> Tensor:
    """AdamW's first step for a learning rate of one: -G / (|G| + soft_sign), with 0 -sign(G).

    Where |g| is near Adam's ε (1e-8) the sign overstates the step; soft_sign=1e-8 is Adam's own.
    """
    if soft_sign:
        return -G / (G.abs() + soft_sign)
    return torch.sign(G).neg_()


def select(calibration: CalibrationSet, options: Options) -> CalibrationSet:
    """`num_examples`, or `share` of the examples with a floor of `min_label_tokens`, at random."""
    if options["num_examples"]:
        return calibration.take(options["num_examples"], seed=options["seed"])
    count = max(1, math.ceil(options["share"] * len(calibration)))
    return calibration.take(count, seed=options["seed"], min_label_tokens=options["min_label_tokens"])


METHOD = Method(
    name="lora_sb",
    description="the sign of the summed gradient: one full fine-tuning step of labelled examples",
    paper="LoRA-SB, arXiv 2411.19557, algorithm 1",
    factorise=factorise,
    needs_calibration="labelled",
    options={
        **DATA_OPTIONS,
        "share": Option(0.001, "of the calibration examples", minimum=0.0, maximum=1.0),
        "min_label_tokens": Option(
            MIN_LABEL_TOKENS, "at least so many tokens to learn, if there are", minimum=0
        ),
        "soft_sign": Option(0.0, "ε of g / (|g| + ε); 0 is the paper's sign", minimum=0.0),
    },
    needs=gradient_needs,
    select=select,
)
