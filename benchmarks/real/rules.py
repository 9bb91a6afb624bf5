"""What a rule would choose among the fixed multiples by what was held back, judged on the test.

Rules are tried on the records of runs that are over, so a new one costs no training. This file knows only the
records.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.real.report import loss_of
from benchmarks.real.selection import Point, Record, order, published

#: A loss on the test counts as at most so many nats more than the base model's.
MAX_HARM = 2.0
#: A state of one run: the multiple, and the evaluation.
State = tuple[float, Point]
#: The states of one task: those that each run would publish, and the last one of each run.
Rule = Callable[[Sequence[State], Sequence[State]], State]


def _valid_loss(state: State) -> float:
    loss = state[1]["valid_loss"]
    return math.inf if loss is None else float(loss)


def _valid_exact(state: State) -> tuple[float, float]:
    return -float(state[1]["valid_exact"] or 0.0), _valid_loss(state)


RULES: Mapping[str, Rule] = {
    "the table's rate": lambda best, last: next(state for state in best if state[0] == 1.0),
    "lowest loss": lambda best, last: min(best, key=_valid_loss),
    "lowest loss at the end": lambda best, last: min(last, key=_valid_loss),
    "most right answers, then loss": lambda best, last: min(best, key=_valid_exact),
}
#: The name of the choice that knows the test.
ORACLE = "best on the test"


@dataclass(frozen=True)
class RuleRow:
    """What one rule reaches with one method and rank."""

    method: str
    rank: int
    rule: str
    num_tasks: int
    #: Share of the right answers, over the tasks that are judged by them; None if there is none.
    right: float | None
    #: Mean over the tasks of the loss on the test, in nats per token.
    loss: float
    #: Tasks on which the loss is above the base model's, and on which the rule leaves the table's rate.
    num_worse: int
    num_moved: int


def rule_rows(records: Sequence[Record]) -> list[RuleRow]:
    """Apply every rule to the sweeps of each method and rank, where ×1 is among them."""
    base = {record["task"]: float(record["loss"]) for record in records if record["kind"] == "base"}
    sweeps: dict[tuple[str, int, str], dict[float, Record]] = defaultdict(dict)
    for record in records:
        if record["kind"] == "run":
            sweeps[record["method"], record["rank"], record["task"]][record["multiple"]] = record
    found: dict[tuple[str, int, str], list[tuple[Record, State]]] = defaultdict(list)
    for (method, rank, _), runs in sweeps.items():
        if 1.0 not in runs:
            continue
        some = runs[1.0]
        best = [(multiple, published(run["points"])) for multiple, run in sorted(runs.items())]
        last = [(multiple, run["points"][-1]) for multiple, run in sorted(runs.items())]
        for name, rule in RULES.items():
            found[method, rank, name].append((some, rule(best, last)))
        found[method, rank, ORACLE].append((some, min(best, key=lambda s: order(s[1], some["judged"]))))
    return [_row(*key, choices, base) for key, choices in found.items()]


def _row(
    method: str,
    rank: int,
    rule: str,
    choices: Sequence[tuple[Record, State]],
    base: Mapping[str, float],
) -> RuleRow:
    exact = [
        (run["num_test"], point["test_exact"]) for run, (_, point) in choices if run["judged"] == "exact"
    ]
    num_answers = sum(num for num, _ in exact)
    losses = [(loss_of(point), base[run["task"]]) for run, (_, point) in choices]
    return RuleRow(
        method,
        rank,
        rule,
        len(choices),
        sum(num * share for num, share in exact) / num_answers if num_answers else None,
        statistics.mean(min(loss, untrained + MAX_HARM) for loss, untrained in losses),
        sum(loss > untrained for loss, untrained in losses),
        sum(multiple != 1.0 for _, (multiple, _) in choices),
    )


def rules_table(rows: Sequence[RuleRow]) -> str:
    """Return the rows as Markdown; empty without any."""
    if not rows:
        return ""
    heads = [
        "method",
        "r",
        "chosen by",
        "tasks",
        "right answers",
        "mean loss",
        "worse than the base",
        "not ×1",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        right = "" if row.right is None else f"{row.right:.1%}"
        cells = [row.method, str(row.rank or ""), row.rule, str(row.num_tasks), right, f"{row.loss:.3f}"]
        lines.append("| " + " | ".join([*cells, str(row.num_worse), str(row.num_moved)]) + " |")
    return "\n".join(["## What rules on the held-back examples would choose", "", *lines, ""])
