"""LoRA-One (arXiv 2502.01235): one spectrally normalised gradient step, as basis and initialization.

    -g = U S Vᵀ,   A' = V_rᵀ √(S_r / (S_1 γ)),   B' = U_r √(S_r / (S_1 γ))              (algorithm 1)

so B' A' = -g_r / (S_1 γ), whose largest singular value is 1/γ. Nothing is subtracted from W.

Needs labelled examples. In the r × r form the factors stay orthonormal, and the singular values belong to the
initialization: `step` is diag(S_r / S_1), to be multiplied by 1/γ (γ = 128). The authors' README writes S
where their code has √S; the code agrees with the paper.
"""

from __future__ import annotations

import torch

from tessera.methods.building.gradient_space import gradient_needs, gradient_triplets
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A [r, d_in], B [d_out, r], orthonormal, and the step diag(S_r / S_1).

    With it, B step A = -g_r / σ_max(g).
    """
    U, S, Vh, gap = gradient_triplets(-data.statistics.g(), data)
    return ModuleFactors(Vh, U, torch.diag(S / S[0]), {"relative_gap": gap})


METHOD = Method(
    name="lora_one",
    description="The leading singular vectors of the gradient, and a normalised gradient step as init",
    paper="LoRA-One, arXiv 2502.01235, algorithm 1",
    factorise=factorise,
    needs_calibration="labelled",
    options=DATA_OPTIONS,
    needs=gradient_needs,
)
