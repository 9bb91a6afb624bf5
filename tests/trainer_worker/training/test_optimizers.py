"""One optimizer for many users equals one optimizer of torch per user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer_worker.training.optimizers import BatchedOptimizer, UserStep, clip_factor
from trainer_worker.training.plan import TrainingPlan

ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
#: The settings of one user each: torch's optimizer and its arguments.
ADAM_USERS = [
    (torch.optim.AdamW, {**ADAM, "weight_decay": 0.0}),
    (torch.optim.AdamW, {**ADAM, "lr": 3e-2, "weight_decay": 0.1}),
    (torch.optim.AdamW, {**ADAM, "lr": 1e-2, "betas": (0.5, 0.95), "weight_decay": 0.0}),
    (torch.optim.AdamW, {**ADAM, "lr": 2e-1, "eps": 1e-2, "weight_decay": 0.0}),
]
SGD_USERS = [
    (torch.optim.SGD, {"lr": 1e-2}),
    (torch.optim.SGD, {"lr": 3e-2, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 1e-1, "weight_decay": 0.3}),
]
MIXED = [ADAM_USERS[1], SGD_USERS[1], ADAM_USERS[2], SGD_USERS[2]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("settings", [ADAM_USERS, SGD_USERS, MIXED], ids=["adamw", "sgd", "both"])
@pytest.mark.parametrize("max_norm", [0.5, None])
def test_equal_to_separate_optimizers(
    dtype: torch.dtype, tolerance: float, settings: Sequence[tuple[Any, Any]], max_norm: float | None
) -> None:
    """With separate learning rates, gradients of very different size, clipping, and skipped steps."""
    torch.manual_seed(0)
    K, shape = 4, (3, 5, 5)
    batched = BatchedOptimizer((K, *shape), dtype=dtype, device=torch.device("cpu"))
    batched.R += torch.randn(K, *shape, dtype=dtype)
    alone = [torch.nn.Parameter(batched.R[k].clone()) for k in range(K)]
    optimizers = [make([p], **options) for p, (make, options) in zip(alone, settings, strict=True)]
    counts = [0] * K
    for step in range(12):
        grad = torch.randn(K, *shape, dtype=dtype) * torch.tensor([1e-4, 1.0, 1e-1, 10])[:, None, None, None]
        steps = []
        for k in [k for k in range(K) if (step + k) % 3 or k == 1]:
            counts[k] += 1
            _, options = settings[k]
            rate = options["lr"] / (step + 1)
            steps.append(
                user_step(k, options, rate, counts[k], take_step(alone, optimizers, grad, k, max_norm, rate))
            )
        batched.step(grad, steps)
    for k in range(K):
        torch.testing.assert_close(batched.R[k], alone[k].data, atol=tolerance, rtol=tolerance)


def take_step(
    alone: Sequence[torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    grad: Tensor,
    k: int,
    max_norm: float | None,
    rate: float,
) -> float:
    """Step torch's optimizer of one user; returns the factor by which its gradient was clipped."""
    alone[k].grad = grad[k].clone()
    norm = torch.nn.utils.clip_grad_norm_(alone[k], float("inf") if max_norm is None else max_norm)
    optimizers[k].param_groups[0]["lr"] = rate
    optimizers[k].step()
    return clip_factor(float(norm), max_norm)


def user_step(slot: int, options: Mapping[str, Any], rate: float, count: int, clip: float) -> UserStep:
    """The same settings by way of a plan."""
    fields: dict[str, Any] = {"weight_decay": options.get("weight_decay", 0.0)}
    if "betas" in options:
        beta1, beta2 = options["betas"]
        fields |= {"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": options["eps"]}
    else:
        fields |= {"optimizer": "sgd", "momentum": options.get("momentum", 0.0)}
    plan = TrainingPlan(1, 4, total_steps=12, learning_rate=1.0, seed=0, **fields)
    return UserStep.of(plan, slot, rate, count, clip)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_others_stay_bitwise_as_they_are_even_beside_nan(optimizer: str) -> None:
    torch.manual_seed(1)
    batched = BatchedOptimizer((3, 2, 4, 4), dtype=torch.float32, device=torch.device("cpu"))
    for tensor in (batched.R, batched.m, batched.v):
        tensor += torch.rand_like(tensor)
    before = [tensor.clone() for tensor in (batched.R, batched.m, batched.v)]
    grad = torch.randn(3, 2, 4, 4)
    grad[0], grad[2] = torch.nan, torch.inf
    batched.step(grad, [UserStep(1, 1e-2, 5, optimizer=optimizer)])
    batched.step(grad, [])
    for tensor, old in zip((batched.R, batched.m, batched.v), before, strict=True):
        assert torch.equal(tensor[[0, 2]], old[[0, 2]])
        assert torch.isfinite(tensor[1]).all()
    assert not torch.equal(batched.R[1], before[0][1])
    assert not torch.equal(batched.m[1], before[1][1])
