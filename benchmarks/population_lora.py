"""LoRA itself as the yardstick: A and B trained per user, many runs (users and rates) in one batch.

    y = W x + s B_k (A_k x)        A_k [r, d_in] uniform as in PEFT, B_k [d_out, r] zero, s = alpha / r = 2

The data order, the schedule and the optimiser are those of the trainer, so that only what is trained differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_core.base_model import LLAMA_LINEARS, BaseModel, iter_target_modules
from adapter_core.chat_format import EncodedExample
from trainer_worker.adamw import BatchedAdamW, UserStep, clip_factor
from trainer_worker.data import TrainingData, micro_batches
from trainer_worker.loss import token_losses
from trainer_worker.plan import TrainingPlan

SCALE = 2.0


@dataclass(frozen=True)
class LoraRun:
    """One user at one rate. plan: rates, steps and order."""

    data: TrainingData
    plan: TrainingPlan
    test: Sequence[EncodedExample]


class LoraTrainer:
    """K runs at once. theta: per target module A [K, r, d_in] and B [K, d_out, r] as leaves."""

    def __init__(self, base: BaseModel, rank: int, runs: Sequence[LoraRun], *, token_budget: int, seed: int = 0) -> None:
        self._base, self._runs, self._budget = base, runs, token_budget
        self._linears = [linear for _, linear in iter_target_modules(base.model, LLAMA_LINEARS)]
        generator = torch.Generator().manual_seed(seed)
        K, device = len(runs), base.device
        self._leaves: list[Tensor] = []
        for linear in self._linears:
            bound = 1 / math.sqrt(linear.in_features)  # kaiming_uniform_(a=√5)
            A = (2 * torch.rand(rank, linear.in_features, generator=generator) - 1) * bound
            self._leaves.append(A.expand(K, -1, -1).clone().to(device).requires_grad_())
            self._leaves.append(torch.zeros(K, linear.out_features, rank, device=device, requires_grad=True))
        numbers = sum(leaf[0].numel() for leaf in self._leaves)
        self.num_parameters = numbers
        self._optimiser = BatchedAdamW((K, 1, 1, numbers), dtype=torch.float32, device=device)
        self._optimiser.R.copy_(self._flat(self._leaves))
        self._rows = torch.zeros(0, dtype=torch.int64, device=device)

    def train(self, progress: Callable[[int], None] | None = None) -> list[float]:
        """Train all runs; the mean test loss per token of each."""
        with self._attached():
            for step in range(max(run.plan.total_steps for run in self._runs)):
                self._step(step)
                if progress is not None:
                    progress(step)
            return self.test_losses()

    @torch.no_grad()
    def test_losses(self) -> list[float]:
        items = [(k, e) for k, run in enumerate(self._runs) for e in run.test]
        return self._pass(items, learn=False).tolist()

    def _step(self, step: int) -> None:
        active = [k for k, run in enumerate(self._runs) if step < run.plan.total_steps]
        items = []
        for k in active:
            run = self._runs[k]
            batch = run.data.batch(step, batch_size=run.plan.batch_size, seed=run.plan.seed)
            items += [(k, example) for example in batch]
        self._pass(items, learn=True)
        grad = self._flat([leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in self._leaves])
        norms = torch.linalg.vector_norm(grad, dim=(1, 2, 3)).tolist()
        users = []
        for k in active:
            plan = self._runs[k].plan
            if math.isfinite(norms[k]):
                clip = clip_factor(norms[k], plan.max_grad_norm)
                users.append(UserStep(k, plan.learning_rate_at(step), step + 1, clip))
        self._optimiser.step(grad, users)
        start = 0
        with torch.no_grad():
            for leaf in self._leaves:
                size = leaf[0].numel()
                leaf.copy_(self._optimiser.R[:, 0, 0, start : start + size].view_as(leaf))
                leaf.grad = None
                start += size

    def _pass(self, items: Sequence[tuple[int, EncodedExample]], *, learn: bool) -> Tensor:
        """Mean loss per token to learn of each run, [K]."""
        tokens = torch.zeros(len(self._runs))
        for k, example in items:
            tokens[k] += example.num_loss_tokens
        tokens = tokens.clamp_min(1).to(self._base.device)
        sums = torch.zeros_like(tokens)
        for batch in micro_batches(items, token_budget=self._budget):
            batch = batch.to(self._base.device)
            self._rows = batch.rows
            losses, _ = token_losses(self._base.model, batch)
            if learn:
                torch.autograd.backward((losses / tokens[batch.owners]).sum())
            sums.index_add_(0, batch.owners, losses.detach())
        return sums / tokens

    def _flat(self, leaves: Sequence[Tensor]) -> Tensor:
        return torch.cat([leaf.detach().flatten(1) for leaf in leaves], dim=1)[:, None, None]

    @contextmanager
    def _attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for index, linear in enumerate(self._linears):
                hook = linear.register_forward_hook(self._hook(index))
                stack.callback(hook.remove)
            yield

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            A, B = (leaf.index_select(0, self._rows) for leaf in self._leaves[2 * index : 2 * index + 2])
            x = inputs[0]
            h = torch.bmm(x, A.mT.to(x.dtype))
            return output + SCALE * torch.bmm(h, B.mT.to(x.dtype))

        return add
