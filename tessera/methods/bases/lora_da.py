"""LoRA-DA ("Data-Aware Initialization for Low-Rank Adaptation via Asymptotic Analysis"): bias and variance.

The subspace that is best in expectation over the noise of the training set. In the paper's terms (eqs 11 to
21, for A of W + B A with B free), with the Fisher information as K-FAC factors, and transposed to W [d_out,
d_in]:

    D = diag(1 / (Y_jj + λ_y)),   Z_λ = Z + λ_z I
    Δ = -D g Z_λ^-1                                    the natural-gradient step          (eqs 16, 21)
    Ω = (tr D / N) Z_λ^-1 - ΔᵀΔ                         variance minus bias                (eq. 19)
    A = eigenvectors of Ω for its r smallest eigenvalues,   B_0 = Δ Aᵀ                     (eqs 17, 18)

The paper's text lost these formulas; they were derived again and agree with the authors' code but for its
additions.

Units (`mode="consistent"`). A loss is a mean over tokens, a likelihood is a sum: with T_i tokens to learn,
the gradient of example i's log-likelihood is T_i times that of its loss. The information of an example is
that of all its positions together, Σ_t (T_i δ_t)(T_i δ_t)ᵀ ⊗ Z, and is shared by its tokens to learn; so
per token to learn

    Y = (1 / Σ T_i) Σ_i Σ_t (T_i δ_t)(T_i δ_t)ᵀ,   g = mean of the examples' gradients,   N = tokens to learn

are in one unit, and N is the size of the *user's training set*, not of the calibration set. Then the
variance term is 2.7 to 5 / 0.27 to 0.5 / 0.03 to 0.05 / 0.003 of the bias term at N = 1e3 / 1e4 / 1e5 /
1e6: it matters for personal data. Damping is relative, λ_z = ρ mean diag Z and λ_y = ρ median diag Y: with
fewer tokens than d_in, Z is singular and damping is the method.

`mode="repo"` is the authors' code: Y of the *mean* loss over all tokens, absolute damping 1e-6, Δ divided
by its largest singular value, the variance weighted by 0.03 / σ_max², N in examples, 10 iterations of
LOBPCG. Such a Y falls with the square of an answer's length: where it is below 1e-6, D is nearly 1e6 I and
the output side is switched off. (Medians of Y_jj on the bundled model, answers of 50 tokens: 2e-7 for query
to 1e-3 for the first layer's output.)

With fewer tokens than d_in that damping is below the rounding of Z's sums, and the authors' code ends with an
error. Here the rounding is told apart (`guidance.damped_inverse`): the step is 0 in what the data has not, as
it is in exact arithmetic. Bundled model, 4 examples, r = 4, distance of A from that of float64 (at most 2):
down_proj of the last layer 0.00; inverted without a check 2.00, negative eigenvalues merely taken as 0 0.01.
Of layer 3: 0.00, 1.42, 0.22.

Forms. "core": B_0 = U S Vᵀ, B = U, first step S Vᵀ; only the freedom of B's columns is lost. "frozen_a": B'
= B_0, the paper's own frozen-A experiment with R = I at the start. "two_sided" (ours): with both factors
frozen the same bound is

    (1/N) tr(A Z^-1 Aᵀ) tr(Bᵀ Y^-1 B) + ‖Δ‖² - ‖Bᵀ Δ Aᵀ‖²

minimised alternately in A and B; B = I recovers Ω, no variance the SVD of Δ. It is kept for study: on the
bundled model (rank 4, 200 examples, best of two rates) it reaches a held-out loss of 4.78, "core" 4.34 with
its start and 4.40 without, LoRA-XS 4.52, random factors 4.74, the base model 5.06.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.building.activations import InputRule, SecondMoment
from tessera.methods.building.collected import Counts, Needs
from tessera.methods.building.decomposition import (
    MAX_DOUBLE_SIDE,
    canonical_columns,
    check_numerical_rank,
    smallest_eigenvectors,
    spectral_norm,
)
from tessera.methods.building.guidance import Fisher, guidance_into, invert_fisher, two_sided
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.checks import check_lora_da
from tessera.methods.options import Option, Options

#: Of LOBPCG. After 40 / 100 / 200 / 400 the 8 directions of 576 inputs that 64 tokens give are 0.93 / 0.50 /
#: 0.17 / 0.02 (of 2.83) off, with 0.960 / 0.991 / 0.9993 / 0.99999 of the exact ones' worth, tr A Ω Aᵀ.
NUM_ITERATIONS = 100


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A [r, d_in] and B [d_out, r] of one module, and the step that they can express."""
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
    """A [r, d_in] for Ω, which may be overwritten.

    The authors' code has no bound of memory, and its absolute damping makes an Ω that ten iterations do not
    solve: where all eigenvectors can be had, it gets them.
    """
    limit = None if options["mode"] == "repo" else data.decomposition.limit_bytes
    if limit is not None:
        limit -= (omega.element_size() - 4) * data.shape.d_out * data.shape.d_in  # Δ, beyond what g had
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
    """The inverse Fisher factors of one module and its step Δ [d_out, d_in], not normalised.

    Both are the caller's to overwrite. The gradient and Z are taken from the statistics, and used up.
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
    fisher = invert_fisher(
        rule.take_moment().to(precise),
        data.statistics.Y().to(precise),
        damping=_choose(options, "damping", repo=1e-6, consistent=1e-3),
        is_relative=(options["damping_mode"] or ("absolute" if is_repo else "relative")) == "relative",
        name=data.shape.name,
    )
    g = data.statistics.take_gradient().to(precise).div_(data.statistics.counts.num_examples)
    return fisher, fisher.natural_step(g, overwrite=True)


@dataclass(frozen=True)
class Noise:
    """How the variance is weighed. inverse_n: β / N, N of eq. 13 in tokens to learn (repo: examples)."""

    inverse_n: float
    num_iterations: int


def resolve_noise(options: Options, counts: Counts) -> Noise:
    is_repo = options["mode"] == "repo"
    counted = counts.population_examples if is_repo else counts.population_label_tokens
    weight = _choose(options, "variance_weight", repo=0.03, consistent=1.0)
    iterations = int(_choose(options, "num_iterations", repo=10, consistent=NUM_ITERATIONS))
    return Noise(weight / (options["population"] or counted), iterations)


def is_normalised(options: Options) -> bool:
    """Whether Δ is divided by its largest singular value."""
    return bool(_choose(options, "normalise", repo=True, consistent=False))


def _choose(options: Options, name: str, *, repo: float, consistent: float) -> float:
    """The option, or what the mode says."""
    given: float | None = options[name]
    if given is not None:
        return given
    return repo if options["mode"] == "repo" else consistent


def needs(rank: int, options: Options) -> Needs:
    if not options["use_fisher"]:
        return Needs(gradient=True)
    return Needs(
        gradient=True,
        inputs=make_rule,
        outputs="full" if options["form"] == "two_sided" else "diagonal",
        output_units="loss" if options["mode"] == "repo" else "token",
    )


def make_rule(name: str, width: int) -> InputRule:
    return SecondMoment(width)


def _variance_to_bias(fisher: Fisher, delta: Tensor, inverse_n: float) -> float:
    variance = inverse_n * fisher.output_trace * torch.linalg.matrix_norm(fisher.Z_inv)
    gram = delta.mT @ delta if delta.shape[1] < delta.shape[0] else delta @ delta.mT
    return float(variance / torch.linalg.matrix_norm(gram))


METHOD = Method(
    name="lora_da",
    description="gradient and Fisher factors: the subspace with the least expected error, noise included",
    paper="LoRA-DA, eqs 16-21 and algorithm 1",
    factorise=factorise,
    needs_calibration="labelled",
    options={
        **DATA_OPTIONS,
        "num_examples": Option(
            256, "at most so many of the calibration examples, at random; 0 is all", minimum=0
        ),
        "mode": Option(
            "consistent", "units of the Fisher factors, or the authors' code", choices=("consistent", "repo")
        ),
        "form": Option("core", "what is frozen", choices=("core", "frozen_a", "two_sided")),
        "population": Option(
            None,
            "N: tokens to learn (repo: examples) of the training set; unset, the calibration set's",
            int,
            minimum=1,
        ),
        "damping": Option(None, "ρ, or λ if absolute; unset 1e-3 (repo: 1e-6)", float, minimum=1e-30),
        "damping_mode": Option(
            None, "relative or absolute; unset by mode", str, choices=("relative", "absolute")
        ),
        "variance_weight": Option(None, "β before the variance; unset 1 (repo: 0.03)", float, minimum=0.0),
        "normalise": Option(None, "divide Δ by its largest singular value; unset: repo only", bool),
        "use_variance": Option(True, "the variance term of Ω"),
        "use_bias": Option(True, "the bias term of Ω"),
        "use_fisher": Option(True, "Fisher factors; without, Δ = -g"),
        "solver": Option("auto", "of the eigenproblem", choices=("auto", "eigh", "lobpcg")),
        "num_iterations": Option(None, "of LOBPCG; unset 100 (repo: 10)", int, minimum=1),
    },
    needs=needs,
    check=check_lora_da,
)
