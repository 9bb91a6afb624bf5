"""From records to a Markdown report: each method's share of LoRA's improvement, by newcomer.

    share = (base - method) / (base - LoRA)        losses on the newcomer's test examples, means over seeds

Each loss is taken at the best rate of the sweep, once with a rate per newcomer and once with the one rate
that is best for all. This file knows only the records.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

#: The yardstick's name in the records.
LORA = "lora"
Record = dict[str, Any]
Losses = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One method at one rank with one start. best: by newcomer, each at its own best rate; common: all at
    `rate`; first: before training. Means over seeds."""

    method: str
    rank: int
    start: str
    num_parameters: int
    rate: float
    is_edge: bool
    best: Losses
    common: Losses
    first: Losses

    @property
    def mean(self) -> float:
        return statistics.mean(self.best.values())


@dataclass(frozen=True)
class Table:
    """All that was measured for one cast and number of examples. base: losses of the untrained model."""

    cast: str
    num_examples: int
    base: Losses
    rows: list[Row]

    @property
    def lora(self) -> Row | None:
        return next((row for row in self.rows if row.method == LORA), None)

    def shares(self, row: Row, *, is_common: bool = False) -> Losses:
        """Per newcomer; empty without the yardstick."""
        lora = self.lora
        if lora is None:
            return {}
        losses, marks = (row.common, lora.common) if is_common else (row.best, lora.best)
        return {
            name: (self.base[name] - loss) / (self.base[name] - marks[name]) for name, loss in losses.items()
        }


def tables(records: Sequence[Record]) -> list[Table]:
    """Of the rows that have all newcomers, the lowest loss first."""
    base: dict[str, Losses] = defaultdict(dict)
    groups: dict[tuple[str, int], dict[tuple[str, int, str], list[Record]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        if record["kind"] == "base":
            base[record["cast"]][record["newcomer"]] = record["loss"]
        elif record["kind"] == "run":
            row = (record["method"], record["rank"], record["start"])
            groups[record["cast"], record["num_examples"]][row].append(record)
    found = []
    for (cast, num), methods in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])):
        rows = [found_row for name, runs in methods.items() if (found_row := row_of(name, runs)) is not None]
        complete = [row for row in rows if set(row.best) == set(base[cast])]
        if complete:
            found.append(Table(cast, num, base[cast], sorted(complete, key=lambda row: row.mean)))
    return found


def row_of(name: tuple[str, int, str], runs: Sequence[Record]) -> Row | None:
    """The sweep of one method; None if no rate went well for all. Of equal runs the last counts."""
    losses: dict[float, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    first: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        loss = math.inf if run["loss"] is None else run["loss"]
        losses[run["rate"]][run["newcomer"]][run["seed"]] = loss
        first[run["newcomer"]][run["seed"]] = run["first_loss"]
    by_rate = {rate: {n: _mean(seeds.values()) for n, seeds in of.items()} for rate, of in losses.items()}
    complete = {rate: _mean(of.values()) for rate, of in by_rate.items() if set(of) == set(first)}
    rate = min(complete, key=lambda rate: complete[rate], default=None)
    if rate is None or not math.isfinite(complete[rate]):
        return None
    best = {n: min(of[n] for of in by_rate.values() if n in of) for n in first}
    before = {n: _mean(seeds.values()) for n, seeds in first.items()}
    is_edge = len(by_rate) > 1 and rate in (min(by_rate), max(by_rate))
    method, rank, start = name
    return Row(method, rank, start, runs[0]["num_parameters"], rate, is_edge, best, by_rate[rate], before)


def report(run: Record, records: Sequence[Record]) -> str:
    """The whole document."""
    where = ", ".join(f"{key} {value}" for key, value in run["hardware"].items())
    if "earlier" in run:
        where += f"; some records are of an earlier run on {run['earlier']['device']}"
    lines = [
        "# The population basis",
        "",
        f"Model {run['model']}; {where}; {run['workers']} process(es); "
        f"rates of the stored R at rank 16 {run['rates']}, of LoRA {run['lora_rates']}.",
        "",
    ]
    unseen: dict[str, set[str]] = {}
    for cast in run["casts"]:
        unseen[cast["cast"]] = {name for name, (_, _, is_new) in cast["newcomers"].items() if is_new}
        low, high = cast["examples_per_user"]
        lines.append(
            f"* `{cast['cast']}`: a population of {cast['num_users']} users of {low} to {high} examples of "
            f"{', '.join(cast['seen'])}; newcomers {', '.join(cast['newcomers'])}; of files that the "
            f"population has not seen: {', '.join(sorted(unseen[cast['cast']])) or 'none'}; seeds by "
            f"number of examples {cast['seeds']}."
        )
    lines += [
        "",
        "Share: of LoRA's improvement over the base model, with the same examples, batches and steps; every "
        "newcomer at the best rate of its sweep; mean ± standard deviation over newcomers. One rate: at the "
        "rate that is best for all. (edge): that rate ends the sweep.",
        "",
    ]
    for table in tables(records):
        lines += _section(table, unseen.get(table.cast, set()))
    return "\n".join(lines + _building(records)) + "\n"


def _section(table: Table, unseen: set[str]) -> list[str]:
    names = list(table.base)
    columns = (
        "method", "rank", "start", "trained numbers", "loss before", "loss", "share", "share, new file",
        "one rate", "share at it", *names,
    )  # fmt: skip
    base = (
        "base model", "", "", "0", "", f"{_mean(table.base.values()):.3f}", "0 %", "0 %", "", "",
        *(f"{loss:.3f}" for loss in table.base.values()),
    )  # fmt: skip
    lines = [f"## Cast `{table.cast}`, {table.num_examples} examples of the newcomer", ""]
    lines += [_cells(columns), "|" + "---|" * len(columns), _cells(base)]
    for row in table.rows:
        shares = table.shares(row)
        cells = (
            row.method,
            str(row.rank),
            row.start,
            f"{row.num_parameters:,}",
            f"{_mean(row.first.values()):.3f}",
            f"{row.mean:.3f}",
            _spread([share for name, share in shares.items() if name not in unseen]),
            _spread([share for name, share in shares.items() if name in unseen]),
            f"{row.rate:.2g}{' (edge)' if row.is_edge else ''}",
            _spread(list(table.shares(row, is_common=True).values())),
            *(f"{row.best[name]:.3f}" for name in names),
        )
        lines.append(_cells(cells))
    return [*lines, ""]


def _building(records: Sequence[Record]) -> list[str]:
    """What was built; where a population taught, with the loss of the users in the slots, and of those held
    out as [step, loss]."""
    columns = (
        "cast", "basis", "rank", "seconds", "users", "steps", "loss, first", "loss, last", "held out",
        "result of step", "their loss",
    )  # fmt: skip
    lines = ["## Building", "", _cells(columns), "|" + "---|" * len(columns)]
    for row in records:
        if row["kind"] == "build":
            taught = [""] * 7
            if curve := row.get("curve"):
                losses = [f"{curve[0][1]:.3f}", f"{curve[-1][1]:.3f}"]
                steps = str(row["plan"]["steps"])
                taught = [str(row["num_users"]), steps, *losses, *_held_out(row.get("held_out"), steps)]
            lines.append(
                _cells((row["cast"], row["method"], str(row["rank"]), f"{row['seconds']:.1f}", *taught))
            )
    return [*lines, ""]


def _held_out(trials: Record | None, steps: str) -> list[str]:
    if trials is None:
        return ["0", steps, ""]
    curve = ", ".join(f"[{step}, {loss:.3f}]" for step, loss in trials["curve"])
    return [str(trials["num_users"]), str(trials["best_step"]), curve]


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _spread(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    spread = f" ± {statistics.stdev(shares):.1%}" if len(shares) > 1 else ""
    return f"{statistics.mean(shares):.1%}{spread}"
