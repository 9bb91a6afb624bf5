"""When requests come and whom they are for: Gamma arrivals, Zipf popularity, both from a seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def gamma_arrivals(rng: np.random.Generator, *, rate: float, cv: float, duration_s: float) -> list[float]:
    """Seconds from the start at which requests come: `rate` a second on average, gaps with coefficient of
    variation `cv` (1: a Poisson process; 4: bursts)."""
    shape = 1 / cv**2
    times: list[float] = []
    now = 0.0
    while (now := now + float(rng.gamma(shape, 1 / (rate * shape)))) < duration_s:
        times.append(now)
    return times


class Zipf:
    """Ranks 0 … n-1 with probability proportional to 1 / (rank + 1)^s: the law itself, over n names."""

    def __init__(self, n: int, s: float) -> None:
        weights = np.arange(1, n + 1, dtype=np.float64) ** -s
        self._cumulative: npt.NDArray[np.float64] = np.cumsum(weights) / weights.sum()

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        found = np.searchsorted(self._cumulative, rng.random(count), side="right")
        return [int(rank) for rank in np.minimum(found, len(self._cumulative) - 1)]
