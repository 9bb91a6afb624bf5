"""The automatic learning rates: tables by basis, initialization and LoRA form, and their measurements.

    r x r form   eta = peak step of the basis * factor of the init * (16 / r) / gain * factor of few examples
    LoRA form    eta = rate of the form * sqrt(16 / r) * s(16) / s(r)

A step eta on R' moves the *stored* core by eta times the preconditioner's gain (under Adam a scale in front
of R only changes the learning rate: LoRAM, proposition 1). So one number serves every scale, such as LoRA-XS
with and without singular values or PiSSA's even split, and the tables hold only what depends on the method.

Knows neither model nor data except the number of examples. The rates do not depend on the length of a job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tessera.formats.basis import Basis
from tessera.methods.forms import find_preset
from tessera.queue.preference import DPO, SUPERVISED

#: The rank for which the tables are stated.
RATED_RANK = 16

#: Adam's peak step on the stored core at rank 16, from two measurements.
#:
#: (a) The bundled model, 250 examples each of devil and jargon, 120 steps of 8, like a typical job of the
#: service; loss on 80 other examples (base 4.824, 4.872). LoRA-XS with singular values (gain 3.39), eta =
#: 1e-3 / 2e-3 / 4e-3 / 8e-3 / 16e-3: 4.296 / 4.271 / 4.267 / 4.294 / 4.349 and 4.313 / 4.259 / 4.238 / 4.247
#: / 4.295. Without them (gain 1), 4e-3 / 8e-3 / 16e-3 / 32e-3: 4.288 / 4.267 / 4.272 / 4.309 and 4.308 /
#: 4.257 / 4.247 / 4.272. So the best stored step is 8e-3 to 16e-3. Batches of 4 or 16, 60 or 240 steps, and
#: 50 examples have the same best eta.
#:
#: (b) The small model, 1,600 examples, 200 steps of 16, two seeds, one H100. The records are in
#: benchmarks/results/quality-h100-small; their rates are factors of 3.2 apart. Best rate times gain at rank
#: 16: LoRA-XS 3.5e-2 on all three data sets, LoRA-SB 3e-2, gradient SVD 1e-2 to 3e-2, LoRA-DA 3e-2 to 1e-1,
#: random 3e-2 to 1e-1. At rank 4: LoRA-XS 1e-1 to 4e-1, LoRA-SB 1e-1, gradient SVD 3e-2 to 1e-1, LoRA-DA and
#: random 1e-1 to 3e-1. Bases that carry less of the gradient tolerate larger steps: bottom vectors still
#: improve at the largest rate tried.
#:
#: Both agree on the order of the methods' steps and differ by a factor of about 2.4 in all of them: longer
#: jobs on a wider model tolerate more. The values are at the upper end of the flat range of (a), because (b)
#: favours larger ones.
SMALL_STEP, LARGE_STEP = 1.6e-2, 3.2e-2
#: (c) The small model, new users with 50 examples, two seeds, one H100. The records are in
#: benchmarks/results/population-h200-small. A basis learned from 29 users at rank 16 with vectors of any
#: length (gain 2.01), at stored step 4e-3 / 1e-2 / 2.5e-2 / 6e-2: 4.049 / 3.941 / 3.978 / 4.193 from zero,
#: 3.903 / 3.878 / 3.976 / 4.205 from its own initialization; kept orthonormal 4.082 / 4.005 / 4.040 / 4.240
#: and 3.956 / 3.941 / 4.033 / 4.252. At rank 64, the same times 16 / 64: 4.029 / 4.043 / 4.320 / 4.837 and
#: 3.956 / 4.016 / 4.313 / 4.837, so there 1 / r falls too slowly, by a factor of 2.5 or more. The pooled
#: gradient in that run is best at 4e-3 to 1e-2, with 400 examples at 1e-2 to 2.5e-2: part of the effect is
#: the number of examples.
POPULATION_STEP = 1e-2
PEAK_STEPS: Mapping[str, float] = {
    "lora_xs": SMALL_STEP,
    "pissa": SMALL_STEP,  # LoRA-XS's basis; only the preconditioner differs
    "lora_sb": SMALL_STEP,
    "gradient_svd": SMALL_STEP,
    "lora_ga": SMALL_STEP,  # gradient SVD's basis at another scale
    "lora_one": SMALL_STEP,  # gradient SVD's basis
    "lora_da": LARGE_STEP,
    "random": LARGE_STEP,
    "lora_xs/random": LARGE_STEP,
    "lora_xs/svd_of_random": LARGE_STEP,
    "lora_xs/bottom": LARGE_STEP,
    "lora_xs/middle": LARGE_STEP,
    "milora": LARGE_STEP,  # LoRA-XS's bottom vectors
    "milora/random": LARGE_STEP,
    "milora/middle": LARGE_STEP,
    "milora/top": SMALL_STEP,
    "loram": LARGE_STEP,  # sines depend on W as little as random factors do
    "population": POPULATION_STEP,
    # The bundled model, 240 examples of devil / jargon, 40 steps of 4, one seed, CPU; loss on 80 others (base
    # 4.828, 5.033) at stored step 4e-3 / 1e-2 / 2.5e-2 / 6e-2. TinyLoRA, rank 16, 64 numbers per module (gain
    # 6.62): 4.462 / 4.343 / 4.334 / 4.382 and 4.624 / 4.525 / 4.472 / 4.499. 64 numbers in all, at 1e-2 /
    # 4e-2 / 1.6e-1: 4.664 / 4.642 / 4.670 and 4.853 / 4.830 / 4.846. 13 in all at rank 2 (gain 12.0; 60 steps
    # of 8, devil), 6e-3 to 2.5e-1: 4.728 to 4.735. PSOFT (gain 6.77): 4.445 / 4.308 / 4.295 / 4.350 and 4.628
    # / 4.510 / 4.465 / 4.506, where LoRA-XS has 4.384 / 4.286 / 4.285 and 4.577 / 4.473 / 4.430.
    "tinylora": LARGE_STEP,
    "psoft": SMALL_STEP,  # LoRA-XS's vectors, and its best step here
}
#: Bases built from a gradient. They overfit few examples, and the more so, the larger the step.
#:
#: (d) The small model, 50 examples of one user (base 4.928), rank 16, two or three seeds, one H200. The
#: records are in benchmarks/results/quality-h200-small. Rate 3e-3 / 1e-2 / 3e-2: LoRA-SB 4.308 / 4.402 /
#: 4.593, gradient SVD 4.303 / 4.371 / 4.619, LoRA-DA 4.630 / 4.668 / 4.742. Factors that do not depend on the
#: data need no smaller step: LoRA-XS (gain 3.49) 4.360 / 4.395 / 4.728, random 4.695 / 4.504 / 4.401. With
#: 250 examples (a) or more the whole step is fine. SmolLM2 wants larger ones: with 60 examples of tickets,
#: JSON and dates, LoRA-SB was best at 0.7 to 2.4 times the table's step, a smaller one left answers wrong.
GRADIENT_BASES = frozenset({"lora_sb", "gradient_svd", "lora_ga", "lora_one", "lora_da"})
EXAMPLES_FOR_WHOLE_STEP = 100
#: For a basis that was not measured, nor any similar one (OLoRA, CorDA, EVA, LoLoRA, an imported one):
#: between the two.
DEFAULT_PEAK_STEP = 2.2e-2

#: The effect of the initialization on the step. In (b), LoRA-SB's basis at rank 4 has the same best rate,
#: 1e-1, from its line-searched step and from zero, and the loss is flat around it in both cases (3e-2: 4.208,
#: 4.213; 1e-1: 4.202, 4.205; 3e-1: 4.210, 4.212). LoRA-DA's best rates were measured from its own step, those
#: of all bases from weights alone from zero. So no initialization changes the rate yet; a later one may.
INIT_FACTORS: Mapping[str, float] = {"zero": 1.0, "noise": 1.0, "sb_step": 1.0, "da_step": 1.0}
#: For an initialization that was not measured: another adapter, a plain gradient step.
DEFAULT_INIT_FACTOR = 1.0

#: Adam's peak rate on A and B at rank 16 (on A, where B's is a multiple of it). Best in the records (b),
#: jargon: 3e-3 for LoRA and MiLoRA (1e-3 is 0.07 worse, 1e-2 0.11), 1e-3 or 3e-3 for EVA and LoRA-DA (0.01
#: apart), 1e-3 for rsLoRA (s = 4), PiSSA, OLoRA, LoRAM and LoRA-One, 3e-4 or 1e-3 for LoRA+, whose B has 16
#: times it.
#:
#: (f) The bundled model, 80 examples of jargon, 20 steps of 8, rank 16, one seed, on a CPU; loss on 40 others
#: (base 4.862). Rate 1e-4 / 3e-4 / 1e-3 / 3e-3: LoRAM 4.512 / 4.326 / 4.234 / 4.446, with rsLoRA's s = 4
#: 4.292 / 4.234 / 4.576 / 5.249. LoRA-GA with s = 4 was not swept; it takes the same share of its default.
LORA_RATES: Mapping[str, float] = {
    "lora": 2.5e-3,
    "milora": 2.5e-3,
    "loram_milora": 2.5e-3,  # MiLoRA's magnitude
    "eva": 2e-3,
    "rslora": 1e-3,
    "lora_plus": 4e-4,
    "pissa": 1e-3,
    "olora": 1e-3,
    "loram": 1e-3,
    "loram_rslora": 3e-4,  # (f)
    "lora_ga_rslora": 4.5e-4,
    "loram_pissa": 1e-3,
    "loram_orthogonal": 1e-3,  # LoRAM's magnitude
    "loram_gaussian": 1e-3,
    "lora_one": 1e-3,
    "lora_da": 1.5e-3,
    "lora_da_no_bias": 1.5e-3,
    "lora_da_no_variance": 1.5e-3,
    "lora_da_no_fisher": 1.5e-3,
    "lora_da_repo": 1.5e-3,
    # A frozen, from the records of (d) with 1,600 examples: B alone tolerates more.
    "lora_fa": 8e-3,
    "lora_fa_orthogonal": 8e-3,
    "lora_da_fa": 2e-2,
    "eva_fa": 3e-3,
    "pissa_fa": 3e-3,
    "lolora": 3e-3,
}
#: For a form that was not measured (most with A by a local rule, CorDA, LoRA-GA): between the two groups.
DEFAULT_LORA_RATE = 1.5e-3


#: The effect of what training minimises, by the names of the methods of a job.
#:
#: (e) Preference pairs, β = 0.1, float32, rank 16, on a CPU. The loss of held-out pairs (0.693 before)
#: falls with the rate, but it sees only the difference of the two answers: large steps pay for it with the
#: preferred answers. At 0.1 / 0.3 / 1 / 3 times the supervised rate, loss and change of the log-probability
#: of the preferred answers in nats per token:
#:
#: SmolLM2-135M-Instruct, LoRA-XS, 20 pairs of the captain (preferred) and the butler (`examples/data`), 20
#: steps of 2, 8 other pairs: 0.392, +0.09 / 0.106, +0.18 / 0.001, -0.03 / 0.000, -0.96; all pairs right.
#: The bundled model, LoRA-XS, 40 such pairs, 40 steps of 5, 10 other pairs: 0.007, -0.18 / 0.0003, -0.35 /
#: 0.000, -0.95 / 0.000, -0.81; all right. The form lora: 0.001, -0.17 / 0.000, -0.43 / 0.000, -1.53; same.
#: The bundled model, LoRA-XS, 240 pairs of the devil's words (preferred) and the jargon file's, 30 steps
#: of 8, 60 other pairs: 0.280, -0.03 / 0.127, -0.14 / 0.062, -0.08; right 0.97 / 0.93 / 1.00.
#:
#: So 0.3: on the real model it keeps the most of the preferred answers.
OBJECTIVE_FACTORS: Mapping[str, float] = {SUPERVISED: 1.0, DPO: 0.3}


@dataclass(frozen=True)
class BasisKind:
    """The facts that the learning rate of the r x r form depends on."""

    #: The basis' method; method/vectors for a variant with its own row in the table.
    method: str
    rank: int
    #: How much larger a step on the stored core is than on the trained numbers (`CoreParametrization.gain`).
    #: For R' the mean over modules of ‖P_out‖ ‖P_in‖ / r, which is the ratio of Frobenius norms for a step of
    #: independent signs; 1 if P is the identity.
    gain: float = 1.0
    #: Name of the initialization.
    start: str = "zero"
    #: One of `OBJECTIVE_FACTORS`.
    objective: str = SUPERVISED

    @classmethod
    def of(
        cls,
        basis: Basis,
        *,
        start: str = "zero",
        scale: Tensor | None = None,
        objective: str = SUPERVISED,
    ) -> BasisKind:
        """scale: the run's s of each module, as a factor on that of the basis, [M]."""
        method = variant(basis.manifest.method, basis.manifest.recipe)
        return cls(method, basis.rank, basis.cores.gain(scale), start, objective)

    @property
    def learning_rate(self) -> float:
        """Adam's peak rate on R'. It falls with the rank approximately as 1 / r.

        In (a), 16e-3 was best at rank 4 (4.342, 4.380; gain 4.24), 4e-3 at 16, and 1e-3 to 2e-3 at 32 (4.247,
        4.164; at 4e-3 4.303, 4.168; gain 3.01). In (b), rank 4 tolerates 3 to 10 times the step of rank 16.
        """
        step = PEAK_STEPS.get(self.method, DEFAULT_PEAK_STEP)
        factor = INIT_FACTORS.get(self.start, DEFAULT_INIT_FACTOR)
        factor *= OBJECTIVE_FACTORS[self.objective]
        return step * factor * RATED_RANK / self.rank / self.gain

    def rate_for(self, num_examples: int) -> float:
        """Return `learning_rate` for this number of training examples; see (d) above."""
        if self.method not in GRADIENT_BASES:
            return self.learning_rate
        return self.learning_rate * min(1.0, num_examples / EXAMPLES_FOR_WHOLE_STEP)


@dataclass(frozen=True)
class LoraKind:
    """The facts that the learning rate of the LoRA form depends on."""

    #: Name of one of `LORA_PRESETS`.
    form: str
    rank: int
    #: s; None: the form's.
    scale: float | None = None
    #: One of `OBJECTIVE_FACTORS`.
    objective: str = SUPERVISED

    @property
    def learning_rate(self) -> float:
        """Adam's peak rate on A; B's is the form's `b_rate` times it.

        The scale has the same effect as in the r x r form. At equal scale the best rate of LoRA falls slowly
        with the rank: in (b) it is 3e-3 at ranks 4 and 16, but the second best is 1e-2 at rank 4 (0.02 worse)
        and 1e-3 at rank 16 (0.07 worse). rsLoRA says that with s = α/√r the rate does not fall; for s = 1
        that means √(16 / r). Raises `InvalidInput` for an unknown form.
        """
        scale = find_preset(self.form).scale
        relative = scale(RATED_RANK) / (self.scale or scale(self.rank))
        rate = LORA_RATES.get(self.form, DEFAULT_LORA_RATE) * OBJECTIVE_FACTORS[self.objective]
        return rate * relative * float((RATED_RANK / self.rank) ** 0.5)

    def rate_for(self, num_examples: int) -> float:
        """Return `learning_rate`, whatever the number of examples.

        In (d), LoRA's best rate with 50 examples is 1e-3, only one step of the sweep below that with 1,600.
        """
        return self.learning_rate


def variant(method: str, recipe: Mapping[str, Any]) -> str:
    """Return method/vectors if the recipe's vectors have their own row in the table, otherwise the method."""
    options = recipe.get("options")
    vectors = options.get("vectors") if isinstance(options, Mapping) else None
    name = f"{method}/{vectors}"
    return name if name in PEAK_STEPS else method
