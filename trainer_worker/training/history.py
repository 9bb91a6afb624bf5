"""What was measured at each step of a run, for its result files. It is part of the run's checkpoint.

Long runs keep a row for every second, fourth … step, and all rows with an evaluation, so that neither the
checkpoint nor the report grows without bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer_worker.training.run import RunUpdate

#: Rows kept. A checkpoint of 4,000 rows is 0.25 MB larger.
MAX_ROWS = 4000
#: Numbers are rounded to this many significant digits.
_DIGITS = 6


@dataclass
class StepRow:
    """One step: what was measured in it, and in the evaluation after it. None: not measured."""

    step: int
    #: Losses are in nats per token.
    train_loss: float | None = None
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None

    @property
    def is_evaluated(self) -> bool:
        return self.valid_loss is not None


class History:
    """The rows of a run by step."""

    def __init__(self, rows: Iterable[StepRow] = ()) -> None:
        self._rows = {row.step: row for row in rows}
        #: A step is kept if it is a multiple of this.
        self._stride = 1

    @property
    def rows(self) -> list[StepRow]:
        """All rows in the order of their steps."""
        return [self._rows[step] for step in sorted(self._rows)]

    def at(self, step: int) -> StepRow:
        """Return the row of a step; an empty one if nothing was measured or kept."""
        return self._rows.get(step, StepRow(step))

    def note(self, update: RunUpdate) -> None:
        """Add what an update has measured. An update with both parts has evaluated before its step."""
        is_step = update.learning_rate > 0
        if update.valid_loss is not None:
            row = self._row(update.step - 1 if is_step else update.step)
            row.valid_loss, row.valid_accuracy = _rounded(update.valid_loss), _rounded(update.valid_accuracy)
        if is_step and update.train_loss is not None and update.step % self._stride == 0:
            row = self._row(update.step)
            row.train_loss, row.train_accuracy = _rounded(update.train_loss), _rounded(update.train_accuracy)
        if len(self._rows) > MAX_ROWS:
            self._thin()

    def to_json(self) -> list[list[Any]]:
        """Return the rows as lists, in the order of the fields of `StepRow`."""
        return [[getattr(row, name) for name in _NAMES] for row in self.rows]

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[Any]]) -> History:
        """Read what `to_json` has returned, also by an earlier or a later release."""
        return cls(StepRow(*row[: len(_NAMES)]) for row in rows if row)

    def _row(self, step: int) -> StepRow:
        return self._rows.setdefault(step, StepRow(step))

    def _thin(self) -> None:
        """Drop every second of the rows without an evaluation."""
        self._stride *= 2
        self._rows = {
            step: row for step, row in self._rows.items() if row.is_evaluated or step % self._stride == 0
        }


_NAMES = [field.name for field in fields(StepRow)]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")
