"""Which state of a run would have been published, read from what was measured at its evaluations.

The rule is that of `TrainRun.record_evaluation`: the lowest validation loss, until so many evaluations in a
row were no better. Other rules can be tried on the same records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from trainer_worker.training.plan import PATIENCE

#: One evaluation: step, train_loss, valid_loss, valid_exact, test_loss, test_exact (shares).
Point = dict[str, Any]
Record = dict[str, Any]


def published(points: Sequence[Point], *, patience: int | None = PATIENCE) -> Point:
    """Return the evaluation whose state a job publishes; the last one if nothing was held back."""
    if points[0]["valid_loss"] is None:
        return points[-1]
    best, num_bad = points[0], 0
    for point in points[1:]:
        if _loss(point) < _loss(best):
            best, num_bad = point, 0
            continue
        num_bad += 1
        if patience is not None and num_bad >= patience:
            break
    return best


def _loss(point: Point) -> float:
    loss = point["valid_loss"]
    return math.inf if loss is None else float(loss)


def best_run(runs: Iterable[Record], judged: str) -> Record | None:
    """Return the run whose published state is best on the *test*: what a sweep by hand could reach.

    judged: exact (then by loss) or loss alone.
    """

    return min(runs, key=lambda run: order(published(run["points"]), judged), default=None)


def order(point: Point, judged: str) -> tuple[float, float]:
    """Return what sorts states from the best on the test to the worst."""
    loss = math.inf if point["test_loss"] is None else float(point["test_loss"])
    return (-float(point["test_exact"]) if judged == "exact" else 0.0, loss)
