"""From records to a Markdown report and its rows: every task against the base model and LoRA's own sweep.

This file knows only the records. A fixed multiple counts with the state that a job would have published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.real.selection import Point, Record, best_run, order, published

#: The yardstick: the best of this method's sweep.
LORA, LORA_RANK = "lora", 16
#: An automatic choice is good if it reaches this share of the best exact match of LoRA's sweep.
TARGET_SHARE = 0.95
#: The same weights in other batches give losses that differ by less.
ROUNDING_NATS = 1e-4


@dataclass(frozen=True)
class Row:
    """One task with one method at one rank. Points have test_loss and test_exact; None: not measured."""

    method: str
    rank: int
    task: str
    judged: str
    num_test: int
    base: Point
    auto: Point | None
    #: The automatic rate by the rate of the tables.
    auto_multiple: float | None
    #: By the multiple of the tables' rate.
    fixed: dict[float, Point]
    #: The best of LoRA's sweep.
    lora: Point | None
    num_parameters: int

    @property
    def own_best(self) -> float | None:
        """The multiple that is best on the test: what the automatic choice could have taken."""
        if not self.fixed:
            return None
        return min(self.fixed, key=lambda multiple: order(self.fixed[multiple], self.judged))

    @property
    def is_good(self) -> bool | None:
        """Whether the automatic choice reaches TARGET_SHARE of LoRA's best; None for tasks judged by loss."""
        if self.judged != "exact" or self.auto is None or self.lora is None:
            return None
        return bool(self.auto["test_exact"] >= TARGET_SHARE * self.lora["test_exact"])

    @property
    def is_no_worse(self) -> bool | None:
        """Whether the automatic choice's loss is at most the base model's."""
        return None if self.auto is None else loss_of(self.auto) <= loss_of(self.base) + ROUNDING_NATS

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method, "rank": self.rank, "task": self.task, "judged": self.judged,
            "num_test": self.num_test, "num_parameters": self.num_parameters, "base": _short(self.base),
            "auto": _short(self.auto), "auto_multiple": self.auto_multiple,
            "fixed": {f"{multiple:g}": _short(point) for multiple, point in sorted(self.fixed.items())},
            "lora": _short(self.lora), "own_best": self.own_best,
            "is_good": self.is_good, "is_no_worse": self.is_no_worse,
        }  # fmt: skip


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Return a row per method, rank and task, in the order of the records. Later records count."""
    base = {
        record["task"]: {"test_loss": record["loss"], "test_exact": record["exact"]}
        for record in records
        if record["kind"] == "base"
    }
    runs: dict[tuple[str, int, str], dict[float, Record]] = {}
    autos: dict[tuple[str, int, str], Record] = {}
    for record in records:
        if record["kind"] not in ("run", "auto"):
            continue
        key = record["method"], record["rank"], record["task"]
        of_key = runs.setdefault(key, {})
        if record["kind"] == "run":
            of_key[record["multiple"]] = record
        else:
            autos[key] = record
    rows = []
    for key, of_key in runs.items():
        method, rank, task = key
        auto = autos.get(key)
        some = auto or next(iter(of_key.values()))
        best = best_run(runs.get((LORA, LORA_RANK, task), {}).values(), some["judged"])
        rows.append(
            Row(
                method, rank, task, some["judged"], some["num_test"], base[task], auto,
                None if auto is None else auto["multiple"],
                {multiple: published(run["points"]) for multiple, run in of_key.items()},
                None if best is None else published(best["points"]),
                next((run["num_parameters"] for run in of_key.values()), 0),
            )
        )  # fmt: skip
    return rows


def report(run: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the report. run: what all records share."""
    lines = [
        "# Defaults on everyday tasks",
        "",
        f"{run['model']} in float32 on {run['hardware']['device']}; seed {run['seed']}; `{run['command']}`.",
        "",
    ]
    if not rows:
        return "\n".join(lines)
    lines += [
        "Each entry is the number of greedy answers on the test that are right, then the loss in nats per "
        "token. `auto` is what a job with the defaults publishes, with the multiple of the tables' rate that "
        "it chose; the other columns are fixed multiples. The state of lowest validation loss counts, as a "
        "job would publish it.",
        "",
        *_summary(rows),
    ]
    for method, rank in dict.fromkeys((row.method, row.rank) for row in rows):
        mine = [row for row in rows if (row.method, row.rank) == (method, rank)]
        lines += ["", f"## {method}" + (f", r = {rank}" if rank else ""), "", *_table(mine)]
    return "\n".join([*lines, ""])


def search_table(records: Sequence[Record]) -> str:
    """Return what the searches of the automatic choices saw of each candidate; empty without any."""
    autos = [record for record in records if record["kind"] == "auto" and record.get("search")]
    if not autos:
        return ""
    multiples = sorted({seen["multiplier"] for auto in autos for seen in auto["search"]["candidates"]})
    heads = ["method", "r", "task", "folds", *(f"×{multiple:g}" for multiple in multiples)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for auto in autos:
        by_multiple = {seen["multiplier"]: _candidate(seen) for seen in auto["search"]["candidates"]}
        cells = [auto["method"], str(auto["rank"]), auto["task"], str(auto["search"]["folds"])]
        cells += [by_multiple.get(multiple, "") for multiple in multiples]
        lines.append("| " + " | ".join(cells) + " |")
    says = (
        "Right answers and loss on what the candidates did not see, and their steps; the chosen one is bold."
    )
    return "\n".join(["## What the searches saw", "", says, "", *lines, ""])


def _candidate(seen: dict[str, Any]) -> str:
    if seen["valid_loss"] is None:
        return f"diverged ({seen['steps']})"
    text = f"{seen['exact']:.0%} / {seen['valid_loss']:.3g} ({seen['steps']})"
    return f"**{text}**" if seen["chosen"] else text


def cost_table(records: Sequence[Record]) -> str:
    """Return the seconds of one run and of a job with the defaults, each alone; empty without any."""
    costs = [record for record in records if record["kind"] == "cost"]
    if not costs:
        return ""
    lines = [
        "| method | r | task | examples | one run, s (steps) | auto, s (steps) | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        lines.append(
            f"| {cost['method']} | {cost['rank']} | {cost['task']} | {cost['num_examples']} "
            f"| {cost['seconds_one']:.2f} ({cost['steps_one']}) "
            f"| {cost['seconds_auto']:.2f} ({cost['steps_auto']}) | {cost['ratio']:.2f} |"
        )
    return "\n".join(["## What the search costs", "", *lines, ""])


def _summary(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"| method | r | trained numbers | right answers: auto | own best | LoRA's best "
        f"| auto ≥ {TARGET_SHARE:g} of LoRA's best | auto no worse than the base | auto chose another rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, rank in dict.fromkeys((row.method, row.rank) for row in rows):
        mine = [row for row in rows if (row.method, row.rank) == (method, rank)]
        moved = [
            not math.isclose(row.auto_multiple, 1.0, rel_tol=1e-6)
            for row in mine
            if row.auto_multiple is not None
        ]
        lines.append(
            f"| {method} | {rank or ''} | {mine[0].num_parameters:,} "
            f"| {_right([row.auto for row in mine], mine)} "
            f"| {_right([row.fixed.get(row.own_best or 0.0) for row in mine], mine)} "
            f"| {_right([row.lora for row in mine], mine)} "
            f"| {_share([row.is_good for row in mine])} "
            f"| {_share([row.is_no_worse for row in mine])} | {_share(moved)} |"
        )
    return lines


def _right(points: Sequence[Point | None], rows: Sequence[Row]) -> str:
    """Return the share of right answers over all tasks with answers; empty where one was not measured."""
    pairs = [pair for pair in zip(points, rows, strict=True) if pair[1].judged == "exact"]
    known = [(point, row) for point, row in pairs if point is not None]
    if not pairs or len(known) < len(pairs):
        return ""
    num_right = sum(point["test_exact"] * row.num_test for point, row in known)
    return f"{num_right / sum(row.num_test for _, row in known):.1%}"


def _share(flags: Sequence[bool | None]) -> str:
    known = [flag for flag in flags if flag is not None]
    return f"{sum(known)} of {len(known)}" if known else ""


def _table(rows: Sequence[Row]) -> list[str]:
    multiples = sorted({multiple for row in rows for multiple in row.fixed})
    heads = ["task", "base", "auto", *(f"×{multiple:g}" for multiple in multiples), "LoRA's best"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        chosen = "" if row.auto_multiple is None else f" (×{row.auto_multiple:.2g})"
        cells = [f"{row.task} ({row.num_test})", cell(row.base, row), cell(row.auto, row) + chosen]
        cells += [cell(row.fixed.get(multiple), row) for multiple in multiples]
        lines.append("| " + " | ".join([*cells, cell(row.lora, row)]) + " |")
    return lines


def cell(point: Point | None, row: Row) -> str:
    """Return an entry of a table: right answers (unless loss alone is judged) and loss."""
    if point is None:
        return ""
    loss = "diverged" if point["test_loss"] is None else f"{point['test_loss']:.3g}"
    return loss if row.judged == "loss" else f"{round(point['test_exact'] * row.num_test)} / {loss}"


def loss_of(point: Point) -> float:
    """Return the loss on the test; infinite where it was not finite."""
    return math.inf if point["test_loss"] is None else float(point["test_loss"])


def _short(point: Point | None) -> Point | None:
    if point is None:
        return None
    return {name: point[name] for name in ("step", "test_loss", "test_exact") if name in point}
