"""Learning A and B from many users at once: users come, train a fresh R for an episode, and go.

Each of K slots holds one user, who begins with R = S (the start that all users share) and trains R alone as a new
user would, by AdamW with warm-up and cosine. Every step gives A and B the gradient of the slots' own losses at
the R they have got to: the basis learns to be good for users who train only R from S, and for a limited time
(first-order MAML; ANIL, arXiv 1909.09157, with the roles turned round: the shared part is slow, the own part
fast). When a user's episode ends, S moves a part of the way to that user's R (Reptile, arXiv 1803.02999), and
the next user takes the slot. The slots are staggered, so that at each step there are users at all ages.

Knows no basis format and no progress report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_core.base_model import BaseModel
from adapter_core.bases.calibration import CalibrationSet
from adapter_core.bases.losses import example_losses
from adapter_core.bases.population_factors import SharedFactors

#: Of AdamW on R, and the gradient norm that is clipped: what the training of an adapter uses.
BETAS = (0.9, 0.999)
EPS = 1e-8
MAX_GRAD_NORM = 1.0
WARMUP_SHARE = 0.05
FINAL_SHARE = 0.1
#: A and B are made orthonormal again after so many steps; in between they drift by less than 1 %.
RETRACT_EVERY = 8


@dataclass(frozen=True)
class LearningPlan:
    """steps: of A and B. episode_steps: of one user's R before another user takes the slot; 0: users stay.

    num_slots: users in one step. batch_size: examples of each. core_rate: of R; basis_rate: angle of a step of A
    and B; start_rate: the part of the way that S goes to a user's R when the episode ends.
    """

    steps: int
    episode_steps: int
    num_slots: int
    batch_size: int
    core_rate: float
    basis_rate: float
    start_rate: float
    seed: int = 0


class Learner:
    """The state of the learning: factors, start, and the users in the slots."""

    def __init__(
        self,
        base: BaseModel,
        factors: SharedFactors,
        users: Sequence[CalibrationSet],
        plan: LearningPlan,
    ) -> None:
        self._base, self.factors, self._users, self._plan = base, factors, users, plan
        M, K, r, _ = factors.core.shape
        self.start = torch.zeros(M, r, r, device=factors.device)
        self._m, self._v = torch.zeros_like(factors.core), torch.zeros_like(factors.core)
        self._random = torch.Generator().manual_seed(plan.seed)
        self._waiting: list[int] = []
        self._orders: list[list[int]] = [[] for _ in users]
        self._seated = [self._next_user() for _ in range(K)]
        stagger = plan.episode_steps / K
        self._age = [int(slot * stagger) for slot in range(K)]  # the first episodes of most are shorter
        self._count = [0] * K
        self.num_episodes = 0

    def step(self, progress: float, *, learn_factors: bool = True) -> float:
        """One step of all slots; the mean of their losses. progress: 0 to 1, the place in the whole schedule."""
        factors, plan = self.factors, self._plan
        with torch.no_grad():
            self.factors.core.detach()  # the leaves are views of it
        factors.zero_grad()
        losses = self._pass()
        self._step_cores()
        if learn_factors:
            self._clip_free_step(progress)
        for slot in range(len(self._age)):
            self._age[slot] += 1
            self._count[slot] += 1
            if plan.episode_steps and self._age[slot] >= plan.episode_steps:
                self._finish(slot, progress)
        return float(losses.mean())

    def retract(self) -> None:
        left, right = self.factors.retract()
        with torch.no_grad():
            core = self.factors.core.detach()
            core.copy_(left[:, None] @ core @ right[:, None])
            self.start = left @ self.start @ right

    def _clip_free_step(self, progress: float) -> None:
        self.factors.step(self._plan.basis_rate * schedule(progress))

    def _pass(self) -> Tensor:
        """The loss of each slot's batch, [K], with the gradients of cores and factors left in them."""
        items = [(slot, index) for slot in range(len(self._seated)) for index in self._batch(slot)]
        examples = tuple(self._users[self._seated[slot]].examples[index] for slot, index in items)
        num_tokens = torch.zeros(len(self._seated))
        for (slot, _), (_, mask) in zip(items, examples, strict=True):
            num_tokens[slot] += sum(mask[1:])
        owners = torch.tensor([slot for slot, _ in items])
        losses = torch.zeros(len(self._seated), device=self.factors.device)
        with self.factors.attached():
            for batch in CalibrationSet(examples).batches():
                batch = batch.to(self.factors.device)
                rows = owners[list(batch.indices)]
                share = (batch.label_counts.cpu() / num_tokens[rows]).to(losses)
                rows = rows.to(losses.device)
                self.factors.own_rows(rows)
                weighted = example_losses(self._base, batch) * share
                torch.autograd.backward(weighted.sum())
                losses.index_add_(0, rows, weighted.detach())
        return losses

    @torch.no_grad()
    def _step_cores(self) -> None:
        """AdamW without decay on every slot's R, each at its own place in its schedule and its own norm."""
        plan, g = self._plan, self.factors.core_grad
        norms = torch.linalg.vector_norm(g, dim=(0, 2, 3))  # [K]
        g = g * (MAX_GRAD_NORM / (norms + 1e-6)).clamp_max(1.0)[:, None, None]
        self._m.lerp_(g, 1 - BETAS[0])
        self._v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        T = plan.episode_steps
        place = [schedule(age / T) if T else 1.0 for age in self._age]
        size = [
            plan.core_rate * p / (1 - BETAS[0] ** (c + 1)) for p, c in zip(place, self._count, strict=True)
        ]
        root = [(1 - BETAS[1] ** (c + 1)) ** 0.5 for c in self._count]
        core = self.factors.core.detach()
        core -= self._column(size) * self._m / (self._v.sqrt() / self._column(root) + EPS)

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, device=self.factors.device)[:, None, None]

    @torch.no_grad()
    def _finish(self, slot: int, progress: float) -> None:
        core = self.factors.core.detach()
        rate = self._plan.start_rate * schedule(progress)
        self.start += rate * (core[:, slot] - self.start)
        core[:, slot] = self.start
        self._m[:, slot] = 0
        self._v[:, slot] = 0
        self._age[slot] = self._count[slot] = 0
        self._seated[slot] = self._next_user()
        self.num_episodes += 1

    def _next_user(self) -> int:
        """Every user once, in random order, then again."""
        if not self._waiting:
            self._waiting = torch.randperm(len(self._users), generator=self._random).tolist()
        return self._waiting.pop()

    def _batch(self, slot: int) -> list[int]:
        user = self._seated[slot]
        order = self._orders[user]
        if len(order) < self._plan.batch_size:
            order += torch.randperm(len(self._users[user]), generator=self._random).tolist()
        batch = order[: self._plan.batch_size]
        del order[: self._plan.batch_size]
        return batch


def schedule(place: float) -> float:
    """A linear warm-up, then a cosine down to FINAL_SHARE, for a place from 0 to 1."""
    if place < WARMUP_SHARE:
        return (place + 0.2 * WARMUP_SHARE) / (1.2 * WARMUP_SHARE)
    done = min(1.0, (place - WARMUP_SHARE) / (1 - WARMUP_SHARE))
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
