"""Which slot every token of a batch uses: the workload axis of a multi-adapter server.

Definitions after Punica's benchmarks: distinct (every token its own adapter), identical (one for all),
uniform (sqrt(T) adapters of equal share), zipf (shares 1/k over T adapters), skewed (one adapter has half of
the tokens), and none (the base model alone, slot 0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POPULARITIES = ("none", "identical", "distinct", "uniform", "zipf", "skewed")


def make_token_slots(popularity: str, num_tokens: int, *, seed: int = 0) -> Tensor:
    """int64 [T] slots in 0..T; a quarter of the tokens of the mixed patterns use the base model."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(1, num_tokens + 1)
    if popularity == "none":
        return torch.zeros(num_tokens, dtype=torch.int64)
    if popularity == "identical":
        return torch.ones(num_tokens, dtype=torch.int64)
    if popularity == "distinct":
        return order[torch.randperm(num_tokens, generator=generator)]
    if popularity == "uniform":
        slots = torch.randint(1, math.isqrt(num_tokens) + 2, (num_tokens,), generator=generator)
    elif popularity == "zipf":
        slots = 1 + torch.multinomial(1.0 / order, num_tokens, replacement=True, generator=generator)
    else:
        slots = torch.where(torch.rand(num_tokens, generator=generator) < 0.5, 1, order)
    return torch.where(torch.rand(num_tokens, generator=generator) < 0.25, 0, slots)
