"""The time that a run still needs, measured by its recent steps, evaluations, and the worker's publications.

    remaining = steps left * recent step + evaluations left * (recent evaluation - recent step) + publishing

A run that ends early needs less; a run whose worker takes in more jobs meanwhile needs more. Knows no Redis;
the clock is passed in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from trainer_worker.training.run import RunUpdate, TrainRun

#: Steps whose mean is the recent step: enough to smooth batches of different lengths, and few enough to
#: notice within a quarter of a usual job that another job has joined.
RECENT_STEPS = 24
#: Steps with an evaluation whose mean is the recent evaluation. A run has about eight.
RECENT_EVALUATIONS = 3
#: Fewer steps say nothing: the first ones warm up.
MIN_STEPS = 2


class PublishTime:
    """Seconds from a worker's last training step of a job to the job's end, over all jobs of the worker."""

    #: Share of the latest measurement in the mean.
    _WEIGHT = 0.3

    def __init__(self) -> None:
        #: None before the first publication.
        self.mean_s: float | None = None

    def note(self, seconds: float) -> None:
        """Add a measurement."""
        mean_s = seconds if self.mean_s is None else self.mean_s
        self.mean_s = mean_s + self._WEIGHT * (seconds - mean_s)


class FinishTime:
    """Measures one run while it trains. `begin` when it joins, `note` for each of its updates."""

    def __init__(self, publishing: PublishTime, clock: Callable[[], float] = time.monotonic) -> None:
        self._publishing, self._clock = publishing, clock
        self._last_step_at: float | None = None
        self._is_evaluated = False
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._evaluated_steps: deque[float] = deque(maxlen=RECENT_EVALUATIONS)

    def begin(self) -> None:
        """Start the clock of the first step."""
        self._last_step_at = self._clock()

    def note(self, update: RunUpdate) -> None:
        """Measure the step that this update ends. An evaluation belongs to the step that follows it."""
        self._is_evaluated |= update.valid_loss is not None
        now = self._clock()
        if update.reference_progress is not None:
            self._last_step_at = now
        if not update.learning_rate:
            return
        if self._last_step_at is not None:
            measured = self._evaluated_steps if self._is_evaluated else self._steps
            measured.append(now - self._last_step_at)
        self._last_step_at, self._is_evaluated = now, False

    def remaining_s(self, run: TrainRun) -> float | None:
        """Return the seconds until the job has ended; None if too little was measured."""
        publish_s = self._publishing.mean_s or 0.0
        if run.is_finished:
            return publish_s
        if len(self._steps) < MIN_STEPS:
            return None
        step_s = _usual(self._steps)
        evaluation_s = max(0.0, _usual(self._evaluated_steps) - step_s) if self._evaluated_steps else 0.0
        done, plan = run.progress.step, run.plan
        steps_left = max(0, plan.total_steps - done)
        evaluations_left = _evaluations(plan.total_steps, plan.evaluate_every) - _evaluations(
            done, plan.evaluate_every
        )
        return steps_left * step_s + (1 + evaluations_left) * evaluation_s + publish_s


def _evaluations(step: int, every: int) -> int:
    """Number of evaluations that are due after step 0 and before `step`."""
    return max(0, step - 1) // every


def _usual(seconds: Sequence[float]) -> float:
    """Mean without the largest value, which is often a wait for somebody else's basis."""
    if len(seconds) < 4:
        return sum(seconds) / len(seconds)
    return (sum(seconds) - max(seconds)) / (len(seconds) - 1)
