"""Which multiple of the tables' rate is best, by method, rank and number of examples, from the same records.

For every task the regret of a multiple is its loss on the test less the lowest of the sweep; the best
multiple has the lowest mean regret over the tasks of a group. This file knows only the records.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.real.report import loss_of
from benchmarks.real.selection import Record, published

#: Regrets are cut here, so that one diverged run does not decide.
MAX_REGRET = 2.0


@dataclass(frozen=True)
class RateRow:
    """A group of tasks: one method, one rank, one number of training examples (0: all of them)."""

    method: str
    rank: int
    num_examples: int
    num_tasks: int
    #: Mean regret in nats per token by multiple.
    regrets: dict[float, float]
    #: The mean over the tasks of the tables' rate, which is what the multiples multiply.
    table_rate: float
    #: Whether a larger or smaller multiple than all that were tried might be better.
    is_edge: bool

    @property
    def best(self) -> float:
        return min(self.regrets, key=lambda multiple: self.regrets[multiple])

    def to_json(self) -> dict[str, Any]:
        regrets = {f"{multiple:g}": regret for multiple, regret in self.regrets.items()}
        return {**asdict(self), "regrets": regrets, "best": self.best}


def rate_rows(records: Sequence[Record]) -> list[RateRow]:
    """Return the groups of all sweeps, and for each method and rank one of all its tasks."""
    sweeps: dict[tuple[str, int, int, str], dict[float, Record]] = defaultdict(dict)
    for record in records:
        if record["kind"] == "run":
            key = record["method"], record["rank"], record["num_examples"], record["task"]
            sweeps[key][record["multiple"]] = record
    groups: dict[tuple[str, int, int], list[dict[float, Record]]] = defaultdict(list)
    for (method, rank, num_examples, _), runs in sweeps.items():
        groups[method, rank, num_examples].append(runs)
        groups[method, rank, 0].append(runs)
    return [_row(*key, groups[key]) for key in sorted(groups)]


def _row(method: str, rank: int, num_examples: int, sweeps: Sequence[dict[float, Record]]) -> RateRow:
    multiples = sorted(set.intersection(*(set(runs) for runs in sweeps)))
    found: dict[float, list[float]] = defaultdict(list)
    rates = []
    for runs in sweeps:
        losses = {multiple: loss_of(published(runs[multiple]["points"])) for multiple in multiples}
        lowest = min(losses.values())
        for multiple, loss in losses.items():
            found[multiple].append(min(MAX_REGRET, loss - lowest))
        rates.append(runs[multiples[0]]["rate"] / multiples[0])
    regrets = {multiple: statistics.mean(found[multiple]) for multiple in multiples}
    best = min(regrets, key=lambda multiple: regrets[multiple])
    is_edge = best in (multiples[0], multiples[-1])
    return RateRow(method, rank, num_examples, len(sweeps), regrets, statistics.mean(rates), is_edge)


def rates_table(rows: Sequence[RateRow]) -> str:
    """Return the groups as a Markdown table; * marks a best multiple at the edge of the sweep."""
    multiples = sorted({multiple for row in rows for multiple in row.regrets})
    heads = ["method", "r", "examples", "tasks", "table's rate", *(f"×{m:g}" for m in multiples), "best"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row.method, str(row.rank), str(row.num_examples or "all"), str(row.num_tasks)]
        cells.append(f"{row.table_rate:.2g}")
        cells += [f"{row.regrets[m]:.3f}" if m in row.regrets else "" for m in multiples]
        lines.append("| " + " | ".join([*cells, f"×{row.best:g}{'*' if row.is_edge else ''}"]) + " |")
    return "\n".join([*lines, ""])
