"""Direct preference optimization (DPO) and its relatives: the losses of pairs of answers to one prompt.

    gain  = log p(answer) - log p_reference(answer), summed over the learned tokens of an answer
    score = gain, or for "sigmoid_norm" and "ipo" gain / number of learned tokens
    Δ     = score of the preferred answer - score of the other one

    sigmoid, sigmoid_norm   -(1 - ε) log σ(β Δ) - ε log σ(-β Δ)    ε: label smoothing
    hinge                   max(0, 1 - β Δ)
    ipo                     (Δ - 1 / (2 β))²

DPO: Rafailov et al. 2023, equation 7; label smoothing ("conservative DPO"): Mitchell 2023; hinge: SLiC, Zhao
et al. 2023; IPO: Azar et al. 2023, equation 17; sigmoid_norm: Tülu 3, Lambert et al. 2024, equation 6. The
names, and the length in IPO, are TRL's. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.queue.preference import PreferenceOptions
from trainer_worker.training.objectives.objective import JudgedPairs, Measured

#: The losses of which the gains are divided by the number of tokens.
_NORMALISED = ("sigmoid_norm", "ipo")


@dataclass(frozen=True)
class Preference(PreferenceOptions):
    """The mean loss over the pairs of a batch."""

    is_preference = True

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    def judge(self, logps: Tensor, reference: Tensor, lengths: Tensor) -> JudgedPairs:
        gains = logps - reference
        size = 1 / lengths.clamp_min(1) if self.loss_type in _NORMALISED else torch.ones_like(gains)
        scores = gains * size
        loss, slope = self._loss(scores[0] - scores[1])
        chosen, rejected = self.beta * gains
        return JudgedPairs(
            loss,
            torch.stack([slope * size[0], -slope * size[1]]),
            (chosen > rejected).to(loss),
            {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected},
        )

    def event_values(self, measured: Measured, *, is_held_out: bool) -> dict[str, float]:
        prefix = "eval_rewards/" if is_held_out else "rewards/"
        values = {"accuracies": measured.accuracy, **measured.details}
        return {prefix + name: value for name, value in values.items()}

    def _loss(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and its derivative by Δ, both [P]."""
        beta, smoothing = self.beta, self.label_smoothing
        if self.loss_type == "hinge":
            return torch.relu(1 - beta * delta), -beta * (beta * delta < 1).to(delta)
        if self.loss_type == "ipo":
            distance = delta - 1 / (2 * beta)
            return distance.square(), 2 * distance
        z = beta * delta
        loss = -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
        return loss, -beta * ((1 - smoothing) * torch.sigmoid(-z) - smoothing * torch.sigmoid(z))
