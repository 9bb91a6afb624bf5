"""AdamW and SGD for the matrices of many users at once, each with settings and a step count of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.queue.hyperparameters import ADAMW, SGD
from trainer_worker.training.plan import ADAM_BETAS, ADAM_EPSILON, TrainingPlan


@dataclass(frozen=True)
class UserStep:
    """The parameters of one user's step."""

    slot: int
    learning_rate: float
    #: Number of this step, from 1, for the bias correction.
    count: int
    #: Factor on the gradient.
    clip: float = 1.0
    weight_decay: float = 0.0
    #: "adamw" or "sgd".
    optimizer: str = ADAMW
    #: Of SGD.
    momentum: float = 0.0
    #: β₁, β₂ and ε of AdamW.
    beta1: float = ADAM_BETAS[0]
    beta2: float = ADAM_BETAS[1]
    epsilon: float = ADAM_EPSILON

    @classmethod
    def of(cls, plan: TrainingPlan, slot: int, learning_rate: float, count: int, clip: float) -> UserStep:
        """Return a step with the plan's optimizer."""
        return cls(
            slot,
            learning_rate,
            count,
            clip,
            plan.weight_decay,
            optimizer=plan.optimizer,
            momentum=plan.momentum,
            beta1=plan.adam_beta1,
            beta2=plan.adam_beta2,
            epsilon=plan.adam_epsilon,
        )


class BatchedOptimizer:
    """R, m, v: [K, M, r, r] for K users.

    Equal to K times `torch.optim.AdamW` or `torch.optim.SGD` over each user's [M, r, r]. SGD keeps its
    momentum in m and leaves v unused.
    """

    def __init__(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> None:
        self.R = torch.zeros(*shape, dtype=dtype, device=device)
        self.m = torch.zeros_like(self.R)
        self.v = torch.zeros_like(self.R)

    def step(self, grad: Tensor, users: Sequence[UserStep]) -> None:
        """Make one step for `users`. The rows of all others stay unchanged.

        grad: [K, M, r, r], finite in the rows of `users`.
        """
        self._adamw(grad, [user for user in users if user.optimizer == ADAMW])
        self._sgd(grad, [user for user in users if user.optimizer == SGD])

    def _adamw(self, grad: Tensor, users: Sequence[UserStep]) -> None:
        """AdamW with η = learning_rate and λ = weight_decay.

        g ← clip · g      m ← β₁ m + (1-β₁) g      v ← β₂ v + (1-β₂) g²
        R ← R (1 - η λ) - η m̂ / (√v̂ + ε)     m̂ = m / (1-β₁ᵗ)      v̂ = v / (1-β₂ᵗ)
        """
        if not users:
            return
        slots, g = self._clipped(grad, users)
        m = self.m[slots].lerp(g, self._column([1 - user.beta1 for user in users]))
        v = self.v[slots].mul_(self._column([user.beta2 for user in users]))
        v += self._column([1 - user.beta2 for user in users]) * g * g
        size = self._column([user.learning_rate / (1 - user.beta1**user.count) for user in users])
        root = self._column([(1 - user.beta2**user.count) ** 0.5 for user in users])
        decay = self._column([1 - user.learning_rate * user.weight_decay for user in users])
        epsilon = self._column([user.epsilon for user in users])
        self.R[slots] = self.R[slots] * decay - size * m / (v.sqrt() / root + epsilon)
        self.m[slots], self.v[slots] = m, v

    def _sgd(self, grad: Tensor, users: Sequence[UserStep]) -> None:
        """SGD with η = learning_rate, λ = weight_decay and μ = momentum, as in torch.

        g ← clip · g + λ R      m ← μ m + g      R ← R - η m
        """
        if not users:
            return
        slots, g = self._clipped(grad, users)
        g = g + self.R[slots] * self._column([user.weight_decay for user in users])
        m = self.m[slots] * self._column([user.momentum for user in users]) + g
        self.R[slots] -= m * self._column([user.learning_rate for user in users])
        self.m[slots] = m

    def _clipped(self, grad: Tensor, users: Sequence[UserStep]) -> tuple[Tensor, Tensor]:
        """Return the slots of the users, and their gradients after clipping."""
        slots = torch.tensor([user.slot for user in users], device=grad.device)
        return slots, grad[slots] * self._column([user.clip for user in users])

    def _column(self, values: list[float]) -> Tensor:
        """[len(values), 1, 1, 1], rounded only once from float64."""
        return torch.tensor(values, dtype=self.R.dtype, device=self.R.device)[:, None, None, None]


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Return the factor of `torch.nn.utils.clip_grad_norm_`; None: nothing is clipped."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
