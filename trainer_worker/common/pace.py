"""How fast a worker trains, measured while it does: the figures of its reports.

    seconds of a tick = step_s + token_s * (trained tokens + evaluated tokens / 3 + their padding)

The two numbers are fitted by least squares over recent ticks. An evaluation has no backward pass, which takes
about two thirds of a step. Knows no Redis and no clock.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import TYPE_CHECKING

from tessera.queue.worker_reports import EVALUATION_COST, WorkerReport

if TYPE_CHECKING:
    from trainer_worker.training.run import TokenCounts

#: Weight that a tick loses with each later one: about the last hundred count.
_DECAY = 0.99
#: Ticks that are left out, because a model's first passes warm it up.
_WARM_UP = 2
#: Relative spread of the tokens per tick below which a slope cannot be told from noise.
_MIN_SPREAD = 0.05
#: Jobs whose median is reported.
_RECENT_JOBS = 9


class Pace:
    """The measurements of one worker."""

    def __init__(self) -> None:
        self._num_ticks = 0
        # Decayed sums of 1, x, y, x x and x y, where x are weighted tokens and y seconds.
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._tokens = self._padding = 0.0
        self._fixed: deque[float] = deque(maxlen=_RECENT_JOBS)
        self._loads: deque[float] = deque(maxlen=_RECENT_JOBS)

    def note_tick(self, tokens: TokenCounts, seconds: float) -> None:
        """Add one tick of all runs."""
        plain = tokens.train + tokens.eval
        if plain == 0:
            return
        self._num_ticks += 1
        if self._num_ticks <= _WARM_UP:
            return
        useful = tokens.train + EVALUATION_COST * tokens.eval
        x = useful * (1 + tokens.pad / plain)
        for name, value in (("_n", 1.0), ("_x", x), ("_y", seconds), ("_xx", x * x), ("_xy", x * seconds)):
            setattr(self, name, _DECAY * getattr(self, name) + value)
        self._tokens = _DECAY * self._tokens + plain
        self._padding = _DECAY * self._padding + tokens.pad

    def note_job(self, *, fixed_s: float, training_s: float, alone_s: float | None) -> None:
        """Add a job that has succeeded. alone_s: what `training_seconds` had said; None if it could not."""
        self._fixed.append(fixed_s)
        if alone_s:
            self._loads.append(training_s / alone_s)

    def report(self, free_slots: int) -> WorkerReport:
        """Return the figures as they are now."""
        step_s, token_s = self._fit()
        return WorkerReport(
            free_slots=free_slots,
            step_s=step_s,
            token_s=token_s,
            padding=self._padding / self._tokens if self._tokens else 0.0,
            # The lower median, because the first job of two has built the basis that the second one found.
            fixed_s=statistics.median_low(self._fixed) if self._fixed else None,
            load=statistics.median_low(self._loads) if self._loads else 1.0,
        )

    def training_seconds(self, *, steps: int, train_tokens: int, eval_tokens: int) -> float | None:
        """Return what a job of this size takes alone; None before the first measurements."""
        return self.report(0).training_seconds(
            steps=steps, train_tokens=train_tokens, eval_tokens=eval_tokens
        )

    def _fit(self) -> tuple[float | None, float | None]:
        if self._n == 0:
            return None, None
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x**2
        if variance <= (_MIN_SPREAD * mean_x) ** 2:
            return 0.0, mean_y / mean_x
        slope = (self._xy / self._n - mean_x * mean_y) / variance
        token_s = min(max(slope, 0.0), mean_y / mean_x)
        return mean_y - token_s * mean_x, token_s
