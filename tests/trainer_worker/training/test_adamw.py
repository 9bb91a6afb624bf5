"""One AdamW for many users equals one torch.optim.AdamW per user."""

from __future__ import annotations

import pytest
import torch

from trainer_worker.training.adamw import BETAS, EPS, BatchedAdamW, UserStep, clip_factor


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equal_to_separate_optimizers(dtype: torch.dtype, tolerance: float, weight_decay: float) -> None:
    """With separate learning rates, gradients of very different size, clipping, and skipped steps."""
    torch.manual_seed(0)
    K, shape, max_norm = 4, (3, 5, 5), 0.5
    batched = BatchedAdamW((K, *shape), dtype=dtype, device=torch.device("cpu"))
    batched.R += torch.randn(K, *shape, dtype=dtype)
    alone = [torch.nn.Parameter(batched.R[k].clone()) for k in range(K)]
    rates = [1e-3, 3e-2, 1e-2, 2e-1]
    optimizers = [
        torch.optim.AdamW([p], lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)
        for p, lr in zip(alone, rates, strict=True)
    ]
    counts = [0] * K
    for step in range(12):
        grad = torch.randn(K, *shape, dtype=dtype) * torch.tensor([1e-4, 1.0, 1e-1, 1e2])[:, None, None, None]
        users = [k for k in range(K) if (step + k) % 3 or k == 1]
        steps = []
        for k in users:
            counts[k] += 1
            alone[k].grad = grad[k].clone()
            norm = torch.nn.utils.clip_grad_norm_(alone[k], max_norm)
            optimizers[k].param_groups[0]["lr"] = rates[k] / (step + 1)
            optimizers[k].step()
            clip = clip_factor(float(norm), max_norm)
            steps.append(UserStep(k, rates[k] / (step + 1), counts[k], clip, weight_decay))
        batched.step(grad, steps)
    for k in range(K):
        torch.testing.assert_close(batched.R[k], alone[k].data, atol=tolerance, rtol=tolerance)


def test_others_stay_bitwise_as_they_are_even_beside_nan() -> None:
    torch.manual_seed(1)
    batched = BatchedAdamW((3, 2, 4, 4), dtype=torch.float32, device=torch.device("cpu"))
    for tensor in (batched.R, batched.m, batched.v):
        tensor += torch.rand_like(tensor)
    before = [tensor.clone() for tensor in (batched.R, batched.m, batched.v)]
    grad = torch.randn(3, 2, 4, 4)
    grad[0], grad[2] = torch.nan, torch.inf
    batched.step(grad, [UserStep(1, 1e-2, 5)])
    batched.step(grad, [])
    for tensor, old in zip((batched.R, batched.m, batched.v), before, strict=True):
        assert torch.equal(tensor[[0, 2]], old[[0, 2]])
        assert not torch.equal(tensor[1], old[1])
        assert torch.isfinite(tensor[1]).all()
