"""Users who are easy to tell apart, and options that learn from them in a second."""

from __future__ import annotations

from typing import Any

import torch

from tessera.methods.bases import CalibrationSet
from tests.tessera.methods.matrices import VOCABULARY

#: Enough to learn a little in a second.
SHORT: dict[str, Any] = {"passes": 2.0, "episode_steps": 6, "basis_rate": 0.03}


def alike(seed: int, num_examples: int) -> CalibrationSet:
    """A user like all others: twelve common words at random. More than that can only be learned by heart."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(num_examples):
        prompt = torch.randint(3, VOCABULARY, (5,), generator=generator)
        answer = 3 + 5 * torch.randint(12, (7,), generator=generator)
        examples.append(((*prompt.tolist(), *answer.tolist()), (False,) * 5 + (True,) * 7))
    return CalibrationSet(tuple(examples))


def personal(seed: int, num_examples: int = 24) -> CalibrationSet:
    """A user who answers everything with three of twelve words."""
    generator = torch.Generator().manual_seed(seed)
    liked = (3 + 5 * torch.arange(12))[torch.randperm(12, generator=generator)[:3]]
    examples = []
    for _ in range(num_examples):
        prompt = torch.randint(3, VOCABULARY, (5,), generator=generator)
        answer = liked[torch.randint(3, (7,), generator=generator)]
        ids = (*prompt.tolist(), *answer.tolist())
        examples.append((ids, (False,) * 5 + (True,) * 7))
    return CalibrationSet(tuple(examples))
