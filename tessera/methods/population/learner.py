"""Learning A and B from many users at once: a user comes, trains an R of its own for an episode, and goes.

Each of K slots holds one user, who begins with R = S, the initialization that all users share, and trains
only R, as a new user would: AdamW, warm-up, cosine. At every step, A and B get the gradient of the summed
losses of all slots at their present R. What is learned is thus a basis that is good for users who train only
R, from S, for a limited time (first-order MAML; ANIL, arXiv 1909.09157, here with an own part inside every
layer). When an episode ends, S moves part of the way to that user's R (Reptile, arXiv 1803.02999) and the
next user takes the slot. Slots are staggered, so that each step has users at all stages of their episode.

This file knows neither the format of a basis nor reports of progress.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.methods.building.calibration import MAX_BATCH_TOKENS, MIN_FILL, CalibrationBatch, CalibrationSet
from tessera.methods.building.gradients import LOSS_SCALE
from tessera.methods.building.losses import example_losses
from tessera.methods.population.factors import SharedFactors
from tessera.model.base_model import BaseModel

#: AdamW on R and its clipping are those of the training of an adapter.
BETAS = (0.9, 0.999)
EPS = 1e-8
MAX_GRAD_NORM = 1.0
#: Share of the steps that warm up, and the last rate as a share of the highest.
WARMUP_SHARE = 0.05
FINAL_SHARE = 0.1

Example = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class LearningPlan:
    """The plan by which a population teaches a basis."""

    #: Steps of A and B.
    steps: int
    #: Steps of a user's R until the next user takes the slot.
    episode_steps: int
    #: Users in one step.
    num_slots: int
    #: Examples of each user in one step.
    batch_size: int
    #: AdamW's learning rate for R.
    core_rate: float
    #: Maximal angle, in radians, by which a step turns the vectors of A and B.
    basis_rate: float
    #: Share of the way that S moves to a user's R when the episode ends.
    start_rate: float
    #: Steps after which A and B are made orthonormal again. 0: never, so that the lengths of their vectors
    #: are learned too and become the preconditioner.
    retract_every: int
    seed: int = 0
    #: Tokens in one pass through the model, padding included.
    batch_tokens: int = MAX_BATCH_TOKENS


class Learner:
    """The factors, the shared initialization S, and the users in the slots.

    Memory: A and B with gradients and two moments, as in training a LoRA, and five times K cores. The caller
    freezes the model (`gradients.frozen`).
    """

    def __init__(
        self,
        base: BaseModel,
        factors: SharedFactors,
        users: Sequence[CalibrationSet],
        plan: LearningPlan,
        *,
        start: Tensor | None = None,
    ) -> None:
        """start: S [M, r, r] in the coordinates of the factors; None: zero."""
        self.factors, self._base, self._users, self._plan = factors, base, users, plan
        M, K, r, _ = factors.core.shape
        self.start = torch.zeros(M, r, r, dtype=factors.dtype, device=factors.device)
        if start is not None:
            self.start.copy_(start)
        factors.core.detach().copy_(self.start[:, None].expand_as(factors.core))
        self._scale = LOSS_SCALE.get(base.model.dtype, 1.0)
        self._m, self._v = torch.zeros_like(factors.core), torch.zeros_like(factors.core)
        self._random = torch.Generator().manual_seed(plan.seed)
        self._waiting: list[int] = []
        self._orders: list[list[int]] = [[] for _ in users]
        self._slot_users = [self._next_user() for _ in range(K)]
        #: Steps of each slot's present R, and the steps by which its first episode is shortened.
        self._age = [0] * K
        self._num_finished = 0
        is_staggered = plan.episode_steps < plan.steps
        self._skipped = [slot * plan.episode_steps // K if is_staggered else 0 for slot in range(K)]

    @property
    def users_in_slots(self) -> list[int]:
        return list(self._slot_users)

    def step(self, place: float) -> float:
        """Take one step of all slots and of A and B, and return the slots' mean loss.

        place: the position in the schedule, 0 to 1. Raises `InvalidInput` if a loss is not finite.
        """
        self.factors.zero_grad()
        loss = self.add_gradients()
        self._step_cores()
        self.factors.step(self._plan.basis_rate * schedule(place))
        for slot, age in enumerate(self._age):
            if age + self._skipped[slot] >= self._plan.episode_steps:
                self._finish(slot, self._plan.start_rate * schedule(place))
        return loss

    def step_cores(self) -> float:
        """Take one step of all slots' R alone, and return the slots' mean loss. Raises like `step`."""
        self.factors.zero_grad()
        loss = self.add_gradients()
        self._step_cores()
        return loss

    @torch.no_grad()
    def loss_on(self, others: Sequence[CalibrationSet]) -> float:
        """Return the slots' mean loss on `others`, further examples of each user. Raises like `step`."""
        items = [(slot, e) for slot, user in enumerate(self._slot_users) for e in others[user].examples]
        with self.factors.attached():
            total = sum(self._losses(items), torch.zeros((), device=self.factors.device))
        return float(total) / len(self._slot_users)

    @torch.no_grad()
    def retract(self) -> None:
        """Make A and B orthonormal again, without changing what the slots' R and S add to the layers."""
        left, right = self.factors.retract()
        core = self.factors.core.detach()
        core.copy_(left[:, None] @ core @ right[:, None])
        self.start = left @ self.start @ right

    @torch.no_grad()
    def final_init(self) -> Tensor:
        """Return S, or the mean of the users' R if no episode has ended."""
        return self.start if self._num_finished else self.factors.core.detach().mean(1)

    def add_gradients(self) -> float:
        """Add the gradients of the slots' summed losses, times the loss scale, and return the mean loss.

        The loss of a slot is the mean over the tokens to learn of its next examples.
        """
        K = len(self._slot_users)
        items = [
            (slot, self._users[self._slot_users[slot]].examples[index])
            for slot in range(K)
            for index in self._batch(slot)
        ]
        total = torch.zeros((), dtype=torch.float64, device=self.factors.device)
        with torch.enable_grad(), self.factors.attached():
            for loss in self._losses(items):
                torch.autograd.backward(loss * self._scale)
                total += loss.detach()
        return float(total) / K

    def _losses(self, items: Sequence[tuple[int, Example]]) -> Iterator[Tensor]:
        """Yield the parts of the slots' summed losses, one for each pass through the model.

        items: (slot, example). The factors must be attached.
        """
        device = self.factors.device
        owners = torch.tensor([slot for slot, _ in items])
        num_tokens = torch.zeros(len(self._slot_users), dtype=torch.float64)
        for slot, (_, mask) in items:
            num_tokens[slot] += sum(mask[1:])
        for batch in self._batches(tuple(example for _, example in items)):
            rows = owners[list(batch.indices)]
            share = (batch.label_counts.double() / num_tokens[rows]).to(device)
            self.factors.own_rows(rows.to(device), batch.token_ids.shape[1])
            losses = example_losses(self._base, batch.to(device))
            yield (losses * share.to(losses)).sum()

    def _batches(self, examples: tuple[Example, ...]) -> Iterator[CalibrationBatch]:
        """Yield batches. On an accelerator padding beats a second pass, which costs its launches."""
        min_fill = MIN_FILL if self.factors.device.type == "cpu" else 0.0
        return CalibrationSet(examples).batches(max_tokens=self._plan.batch_tokens, min_fill=min_fill)

    @torch.no_grad()
    def _step_cores(self) -> None:
        """Take a step of AdamW on every slot's R, each with its own age and its own gradient norm."""
        g = self.factors.core_grad / self._scale
        norms = torch.linalg.vector_norm(g, dim=(0, 2, 3))  # [K]
        g = g * (MAX_GRAD_NORM / (norms + 1e-6)).clamp_max(1.0)[:, None, None]
        self._m.lerp_(g, 1 - BETAS[0])
        self._v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        self._age = [age + 1 for age in self._age]
        sizes = [
            self._plan.core_rate * self._age_schedule(slot) / (1 - BETAS[0] ** age)
            for slot, age in enumerate(self._age)
        ]
        roots = [(1 - BETAS[1] ** age) ** 0.5 for age in self._age]
        core = self.factors.core.detach()
        core -= self._column(sizes) * self._m / (self._v.sqrt() / self._column(roots) + EPS)

    def _age_schedule(self, slot: int) -> float:
        return schedule((self._age[slot] - 1 + self._skipped[slot]) / self._plan.episode_steps)

    def _column(self, values: list[float]) -> Tensor:
        """Return the values as [K, 1, 1], to be broadcast over [M, K, r, r]."""
        return torch.tensor(values, dtype=self.factors.dtype, device=self.factors.device)[:, None, None]

    @torch.no_grad()
    def _finish(self, slot: int, rate: float) -> None:
        """Move S towards the slot's R by `rate`, and give the slot to the next user."""
        self.start += rate * (self.factors.core.detach()[:, slot] - self.start)
        self._num_finished += 1
        self._slot_users[slot] = self._next_user()
        self.factors.core.detach()[:, slot] = self.start
        self._m[:, slot] = 0
        self._v[:, slot] = 0
        self._age[slot] = self._skipped[slot] = 0

    def _next_user(self) -> int:
        """Return the next user: every user once in random order, then all again in another."""
        if not self._waiting:
            self._waiting = torch.randperm(len(self._users), generator=self._random).tolist()
        return self._waiting.pop()

    def _batch(self, slot: int) -> list[int]:
        """Return the next examples of the slot's user: all of them in random order, then again in another."""
        user, size = self._slot_users[slot], self._plan.batch_size
        order = self._orders[user]
        while len(order) < size:
            order += torch.randperm(len(self._users[user]), generator=self._random).tolist()
        batch, self._orders[user] = order[:size], order[size:]
        return batch


def schedule(place: float) -> float:
    """Return the factor of the rate at a place from 0 to 1: linear warm-up, then a cosine to FINAL_SHARE."""
    if place < WARMUP_SHARE:
        return (place + 0.25 * WARMUP_SHARE) / (1.25 * WARMUP_SHARE)
    done = min(1.0, (place - WARMUP_SHARE) / (1 - WARMUP_SHARE))
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
