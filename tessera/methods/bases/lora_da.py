"""LoRA-DA (arXiv 2510.24561): the subspace with the least expected error, bias against variance.

The input space A with the least expected error over the noise of the training set, if B is free. With the
Fisher information as K-FAC factors, transposed to W [d_out, d_in]:

    D = diag(1 / (Y_jj + λ_y)),   Z_λ = Z + λ_z I
    Δ = -D g Z_λ^-1                                    the natural-gradient step          (eqs 16, 21)
    Ω = (tr D / N) Z_λ^-1 - ΔᵀΔ                        variance minus bias                (eq. 19)
    A = eigenvectors of Ω for its r smallest eigenvalues,   B_0 = Δ Aᵀ                    (eqs 17, 18)

Z: second moment of the module's inputs;  Y: of the gradients at its outputs;  N: size of the training set.

Theorem 4.2 has the diagonal of an inverse, [Y_λ^-1]_jj, where appendix D and the authors' code keep only the
diagonal of Y and invert that, as above. The two differ wherever outputs are correlated, and `output_factor`
chooses:

    diagonal  D = diag(1 / (Y_jj + λ_y))        appendix D, the authors' code
    block     D = diag([(Y + λ_y I)^-1]_jj)     theorem 4.2 with K-FAC: the diagonal blocks of J^-1
    full      Δ = -(Y + λ_y I)^-1 g Z_λ^-1      the whole natural gradient, of which eq. 21 keeps the blocks

Needs labelled examples. `mode="consistent"` (default) measures Y, g and N per token to learn and damps
relative to the moments; `mode="repo"` is the authors' code, with its additions. With both factors frozen,
`form` says what becomes of B_0 = U S Vᵀ:

    core        B = U, first step S Vᵀ; only the freedom of B's columns is lost
    frozen_a    B' = B_0, the paper's own experiment with a frozen A; training begins at R = I there
    two_sided   ours: A and B minimise the bound for two frozen factors (`lora_da_guidance.py`); for study

docs/methods.md ("LoRA-DA in detail") derives the units and gives the measurements behind these choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.algebra.lora_da_guidance import Fisher, guidance_into, invert_fisher, two_sided
from tessera.methods.building.activations import InputRule, SecondMoment
from tessera.methods.building.collected import Counts, Needs
from tessera.methods.building.decomposition import (
    MAX_DOUBLE_SIDE,
    canonical_columns,
    check_numerical_rank,
    smallest_eigenvectors,
    spectral_norm,
)
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.checks import check_lora_da
from tessera.methods.options import Option, Options

#: Iterations of LOBPCG. With 64 tokens and 576 inputs, 8 directions are 0.93 / 0.50 / 0.17 / 0.02 (of 2.83)
#: off the exact ones after 40 / 100 / 200 / 400, and reach 0.960 / 0.991 / 0.9993 / 0.99999 of their tr A Ω
#: Aᵀ.
NUM_ITERATIONS = 100


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A [r, d_in], B [d_out, r] and the part of Δ that they can express, as the first step."""
    fisher, delta = module_step(data, options)
    noise = resolve_noise(options, data.statistics.counts)
    inverse_n = noise.inverse_n
    sigma = spectral_norm(delta)
    if not sigma > 0:
        raise InvalidInput(f"the natural-gradient step of {data.shape.name} is {sigma}", param="calibration")
    if is_normalised(options):
        delta, inverse_n = delta.div_(sigma), inverse_n / sigma**2
    if options["form"] == "two_sided":
        A, B = two_sided(fisher, delta, data.rank, inverse_n=inverse_n if options["use_variance"] else 0.0)
        return ModuleFactors(A, B, B.mT @ delta @ A.mT, {"sigma_max": sigma})
    notes = {"sigma_max": sigma, "variance_to_bias": _variance_to_bias(fisher, delta, inverse_n)}
    omega = guidance_into(
        fisher.Z_inv,
        delta,
        variance=inverse_n * fisher.output_trace,
        use_variance=options["use_variance"],
        use_bias=options["use_bias"],
    )
    del fisher
    A = _bottom_space(omega, data, options, noise).to(delta)
    del omega
    B0 = delta @ A.mT
    U, S, Vh = torch.linalg.svd(B0, full_matrices=False)
    check_numerical_rank(S, data.rank, f"the natural-gradient step of {data.shape.name} on its input space")
    if options["form"] == "frozen_a":
        return ModuleFactors(A, B0, torch.eye(data.rank), notes)
    signed = canonical_columns(U)
    return ModuleFactors(A, signed, (signed.mT @ U) @ torch.diag(S) @ Vh, notes)


def _bottom_space(omega: Tensor, data: ModuleData, options: Options, noise: Noise) -> Tensor:
    """Return A [r, d_in] for Ω, which may be overwritten.

    The authors' mode ignores the memory bound: its absolute damping makes an Ω that ten iterations of LOBPCG
    do not solve, so all eigenvectors are computed where the side allows it.
    """
    limit = None if options["mode"] == "repo" else data.decomposition.limit_bytes
    if limit is not None:
        # Δ takes this much more memory than g did.
        limit -= (omega.element_size() - 4) * data.shape.d_out * data.shape.d_in
    Q = smallest_eigenvectors(
        omega,
        data.rank,
        solver=options["solver"],
        num_iterations=noise.num_iterations,
        generator=data.generator(),
        limit_bytes=limit,
    )
    return Q.mT.contiguous()


def module_step(data: ModuleData, options: Options) -> tuple[Fisher, Tensor]:
    """Return the inverse Fisher factors of one module and its step Δ [d_out, d_in], not normalised.

    The caller may overwrite both. This uses up the gradient and Z of the statistics.
    """
    precise = torch.float64 if max(data.weight.shape) <= MAX_DOUBLE_SIDE else torch.float32
    if not options["use_fisher"]:
        g = data.statistics.take_gradient().to(precise).div_(data.statistics.counts.num_examples)
        identity = torch.eye(data.shape.d_in, dtype=precise, device=g.device)
        ones = torch.ones(data.shape.d_out, dtype=precise, device=g.device)
        fisher = Fisher(identity, torch.diag(ones) if options["form"] == "two_sided" else ones)
        return fisher, g.neg_()
    rule = data.statistics.inputs
    assert isinstance(rule, SecondMoment)
    is_repo = options["mode"] == "repo"
    found = invert_fisher(
        rule.take_moment().to(precise),
        data.statistics.Y().to(precise),
        damping=_choose(options, "damping", repo=1e-6, consistent=1e-3),
        is_relative=(options["damping_mode"] or ("absolute" if is_repo else "relative")) == "relative",
        name=data.shape.name,
    )
    fisher = found.diagonal_blocks() if options["output_factor"] == "block" else found
    g = data.statistics.take_gradient().to(precise).div_(data.statistics.counts.num_examples)
    return fisher, fisher.natural_step(g, overwrite=True)


@dataclass(frozen=True)
class Noise:
    """The weight of the variance, and how precisely its eigenproblem is solved."""

    #: β / N of eq. 13, with N in tokens to learn (in mode "repo": in examples).
    inverse_n: float
    #: Iterations of LOBPCG, where that is the solver.
    num_iterations: int


def resolve_noise(options: Options, counts: Counts) -> Noise:
    """Fill in what the options leave to the mode and to the size of the calibration set."""
    is_repo = options["mode"] == "repo"
    counted = counts.population_examples if is_repo else counts.population_label_tokens
    weight = _choose(options, "variance_weight", repo=0.03, consistent=1.0)
    iterations = int(_choose(options, "num_iterations", repo=10, consistent=NUM_ITERATIONS))
    return Noise(weight / (options["population"] or counted), iterations)


def is_normalised(options: Options) -> bool:
    """Return whether Δ is divided by its largest singular value."""
    return bool(_choose(options, "normalise", repo=True, consistent=False))


def _choose(options: Options, name: str, *, repo: float, consistent: float) -> float:
    """Return the option if it is set, and otherwise the default of the mode."""
    given: float | None = options[name]
    if given is not None:
        return given
    return repo if options["mode"] == "repo" else consistent


def needs(rank: int, options: Options) -> Needs:
    """Return the required statistics: the gradient and, for the Fisher information, the second moments."""
    if not options["use_fisher"]:
        return Needs(gradient=True)
    return Needs(
        gradient=True,
        inputs=make_rule,
        outputs="full" if uses_full_outputs(options) else "diagonal",
        output_units="loss" if options["mode"] == "repo" else "token",
    )


def uses_full_outputs(options: Options) -> bool:
    """Return whether the whole second moment of the output gradients is needed."""
    return bool(options["form"] == "two_sided" or options["output_factor"] != "diagonal")


def make_rule(name: str, width: int) -> InputRule:
    return SecondMoment(width)


def _variance_to_bias(fisher: Fisher, delta: Tensor, inverse_n: float) -> float:
    """Return the ratio of the Frobenius norms of Ω's two terms."""
    variance = inverse_n * fisher.output_trace * torch.linalg.matrix_norm(fisher.Z_inv)
    gram = delta.mT @ delta if delta.shape[1] < delta.shape[0] else delta @ delta.mT
    return float(variance / torch.linalg.matrix_norm(gram))


METHOD = Method(
    name="lora_da",
    description="The subspace with the least expected error, from the gradient and the Fisher information",
    paper="LoRA-DA, arXiv 2510.24561, eqs 16-21 and algorithm 1",
    factorise=factorise,
    needs_calibration="labelled",
    options={
        **DATA_OPTIONS,
        "num_examples": Option(
            256, "number of calibration examples to draw at random, at most; 0: all", minimum=0
        ),
        "mode": Option(
            "consistent",
            "consistent: all quantities per token to learn; repo: the authors' code",
            choices=("consistent", "repo"),
        ),
        "form": Option(
            "core", "what is made of the frozen factors", choices=("core", "frozen_a", "two_sided")
        ),
        "output_factor": Option(
            "diagonal",
            "what is kept of the outputs' Fisher information: its diagonal (appendix D), the diagonal of its "
            "inverse (block, theorem 4.2), or all of it",
            choices=("diagonal", "block", "full"),
        ),
        "population": Option(
            None,
            "N, the tokens to learn in the training set (repo: its examples); default: the calibration set's",
            int,
            minimum=1,
        ),
        "damping": Option(
            None, "ρ (relative) or λ (absolute damping); default 1e-3 (repo: 1e-6)", float, minimum=1e-30
        ),
        "damping_mode": Option(
            None,
            "whether damping scales with the moments; default relative (repo: absolute)",
            str,
            choices=("relative", "absolute"),
        ),
        "variance_weight": Option(
            None, "weight β of the variance; default 1 (repo: 0.03)", float, minimum=0.0
        ),
        "normalise": Option(None, "divide Δ by its largest singular value; default false (repo: true)", bool),
        "use_variance": Option(True, "include the variance term of Ω"),
        "use_bias": Option(True, "include the bias term of Ω"),
        "use_fisher": Option(True, "use the Fisher factors; if false, Δ = -g"),
        "solver": Option("auto", "solver of the eigenproblem", choices=("auto", "eigh", "lobpcg")),
        "num_iterations": Option(None, "iterations of LOBPCG; default 100 (repo: 10)", int, minimum=1),
    },
    needs=needs,
    check=check_lora_da,
)
