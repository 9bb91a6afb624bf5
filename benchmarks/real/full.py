"""Full fine-tuning, the baseline that trains every weight of the model, one run after the other."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.population.score import matmul_precision
from benchmarks.real.encoded import EncodedTask
from benchmarks.real.judge import judge
from benchmarks.real.runs import Setting, plan_of, to_point
from benchmarks.real.selection import Point, Record
from tessera.chat.chat_format import EncodedExample
from trainer_worker.data.training_data import micro_batches
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.trainer import token_losses


@dataclass(frozen=True)
class FullKind:
    """AdamW's peak rate for all weights: the one that papers on fine-tuning of small models use."""

    learning_rate: float = 3e-5

    def rate_for(self, num_examples: int) -> float:
        return self.learning_rate


def full_records(setting: Setting, tasks: Sequence[EncodedTask]) -> Iterator[Record]:
    """Train all weights at several rates for each task. The model is as before afterwards."""
    model = setting.base.model
    num_parameters = sum(weight.numel() for weight in model.parameters())
    for task in tasks:
        for multiple in setting.full_multiples:
            plan = plan_of(setting, task, FullKind(), multiple)
            started = time.perf_counter()
            with _trainable(model) as weights:
                points, finish = _train(setting, task, plan, weights)
            yield {
                "kind": "run", **task.describe(), "multiple": multiple, "rate": plan.learning_rate,
                "total_steps": plan.total_steps, "finish": finish, "points": points,
                "num_parameters": num_parameters, "seconds_together": time.perf_counter() - started,
                "num_together": 1,
            }  # fmt: skip


def _train(
    setting: Setting, task: EncodedTask, plan: TrainingPlan, weights: Sequence[nn.Parameter]
) -> tuple[list[Point], str]:
    """Return the evaluations, and whether the run was completed or diverged."""
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=plan.weight_decay)
    points: list[Point] = []
    losses: list[float] = []
    for step in range(plan.total_steps + 1):
        if step % plan.evaluate_every == 0 or step == plan.total_steps:
            point = _measure(setting, task)
            points.append(point | {"step": step, "train_loss": statistics.mean(losses) if losses else None})
            losses.clear()
        if step == plan.total_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate_at(step)
        with matmul_precision(is_fast=setting.is_fast):
            loss = _gradient(setting, task.data.batch(step, batch_size=plan.batch_size, seed=plan.seed))
        norm = nn.utils.clip_grad_norm_(weights, plan.max_grad_norm or math.inf)
        if not (loss.isfinite() and norm.isfinite()):
            return points, "diverged"
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return points, "completed"


def _gradient(setting: Setting, rows: Sequence[EncodedExample]) -> Tensor:
    """Add the gradient of the mean loss of a batch to the weights' `.grad`; returns the loss."""
    model = setting.base.model
    num_tokens = sum(row.num_loss_tokens for row in rows)
    total = torch.zeros((), device=model.device)
    for batch in micro_batches([(0, row) for row in rows], token_budget=setting.token_budget):
        losses, _ = token_losses(model, batch.to(model.device))
        part = losses.sum() / num_tokens
        torch.autograd.backward(part)
        total += part.detach()
    return total


def _measure(setting: Setting, task: EncodedTask) -> Point:
    sets = [(0, rows) for rows in (task.test, task.data.valid) if rows]
    scores = judge(setting.base.model, lambda rows: nullcontext(), sets, token_budget=setting.token_budget)
    return to_point(scores[0], scores[1] if task.data.valid else None)


@contextmanager
def _trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let all weights learn, and restore them afterwards."""
    weights = list(model.parameters())
    before = [weight.detach().clone() for weight in weights]
    learned = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_()
        yield weights
    finally:
        with torch.no_grad():
            for weight, value, was in zip(weights, before, learned, strict=True):
                weight.copy_(value)
                weight.grad = None
                weight.requires_grad_(was)
