"""LoRA-One (arXiv 2502.01235): one gradient step, spectrally normalised, as basis and start.

    -g = U S Vᵀ,   A' = V_rᵀ √(S_r / (S_1 γ)),   B' = U_r √(S_r / (S_1 γ)),   nothing subtracted
    (algorithm 1)

so that B' A' = -g_r / (S_1 γ): its largest singular value is 1/γ. In the r × r form the factors stay
orthonormal and the singular values go to the start: `step` = diag(S_r / S_1), to be multiplied by 1/γ
(128). The authors' README writes S where their code has √S; the code agrees with the paper.
"""

from __future__ import annotations

import torch

from tessera.methods.building.gradient_svd import gradient_needs, gradient_triplets
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A [r, d_in], B [d_out, r] orthonormal; step: diag(S_r / S_1), so that B step A = -g_r / σ_max(g)."""
    U, S, Vh, gap = gradient_triplets(-data.statistics.g(), data)
    return ModuleFactors(Vh, U, torch.diag(S / S[0]), {"relative_gap": gap})


METHOD = Method(
    name="lora_one",
    description="the leading singular vectors of the gradient, with one normalised gradient step as start",
    paper="LoRA-One, arXiv 2502.01235, algorithm 1",
    factorise=factorise,
    needs_calibration="labelled",
    options=DATA_OPTIONS,
    needs=gradient_needs,
)
