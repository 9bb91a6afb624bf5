"""One method at one rank on all tasks: the automatic choice beside fixed multiples of the tables' rate.

All runs of one basis are co-trained, so a sweep costs little more than its tokens. Yields records of kind
"base", "build", "run" (a fixed rate, with its whole history), "auto" (what a job with the defaults
publishes) and "cost".
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from benchmarks.real.automatic import automatic_records, cost_records
from benchmarks.real.encoded import EncodedTask
from benchmarks.real.forms import CoreForm, Form, LoraForm
from benchmarks.real.full import full_records
from benchmarks.real.judge import judge
from benchmarks.real.methods import Method, build
from benchmarks.real.runs import Setting, Trial, plan_of, train
from benchmarks.real.selection import Record
from tessera.methods.bases import Population

#: Runs that the automatic choice may train for one task, at most.
MAX_RUNS_PER_CHOICE = 16


def base_records(setting: Setting, tasks: Sequence[EncodedTask]) -> Iterator[Record]:
    """Judge the untrained model on every task."""
    sets = [(0, task.test) for task in tasks]
    scores = judge(setting.base.model, lambda rows: nullcontext(), sets, token_budget=setting.token_budget)
    for task, score in zip(tasks, scores, strict=True):
        yield {
            "kind": "base", **task.describe(), "loss": score.loss, "exact": score.exact,
        }  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A piece of work that is done as a whole."""

    method: Method
    #: 0 for full fine-tuning.
    rank: int
    #: What a learned basis is built from; None for the other methods.
    population: Population | None = None
    #: Over the population's examples; None takes the method's default.
    passes: float | None = None
    #: all; rates: without the automatic choice; cost: only what the automatic choice costs.
    measures: Literal["all", "rates", "cost"] = "all"


def perform(setting: Setting, cell: Cell, tasks: Sequence[EncodedTask]) -> Iterator[Record]:
    """Do the work of a cell on all tasks."""
    method = cell.method
    if method.form == "full":
        records = full_records(setting, tasks)
    elif method.form == "lora":
        records = _of_form(setting, cell, LoraForm(setting, method, cell.rank), tasks)
    else:
        records = _in_bases(setting, cell, tasks)
    for record in records:
        yield {**record, "method": method.name, "rank": cell.rank}


def _in_bases(setting: Setting, cell: Cell, tasks: Sequence[EncodedTask]) -> Iterator[Record]:
    """Build one basis for all tasks, or one for each from its own examples."""
    is_shared = cell.method.is_shared
    for group in [list(tasks)] if is_shared else [[task] for task in tasks]:
        examples = cell.population if is_shared else group[0].calibration
        built = build(
            setting.base, cell.method, cell.rank, examples, token_budget=setting.token_budget,
            is_fast=setting.is_fast, passes=cell.passes,
        )  # fmt: skip
        names = [task.name for task in group]
        yield {"kind": "build", "tasks": names, "seconds": built.seconds, "gain": built.kind.gain}
        yield from _of_form(setting, cell, CoreForm(setting, built), group)


def _of_form(setting: Setting, cell: Cell, form: Form, tasks: Sequence[EncodedTask]) -> Iterator[Record]:
    """Train every multiple of every task, then the automatic choices, together as far as memory allows."""
    if cell.measures == "cost":
        yield from cost_records(setting, form, tasks)
        return
    trials = []
    for task in tasks:
        for multiple in setting.multiples:
            plan = plan_of(setting, task, form.kind, multiple)
            trials.append(Trial(form.make(f"{task.name}/{multiple:g}", task, plan), task, multiple))
    size = max(1, setting.max_numbers // form.num_parameters)
    for first in range(0, len(trials), size):
        part = trials[first : first + size]
        started = time.perf_counter()
        train(setting, form.gather([trial.run for trial in part]), part)
        seconds = time.perf_counter() - started
        shared = {
            "num_parameters": form.num_parameters, "seconds_together": seconds, "num_together": len(part),
        }  # fmt: skip
        yield from ({**run_record(trial), **shared} for trial in part)
    if cell.measures == "rates":
        return
    size = max(1, size // MAX_RUNS_PER_CHOICE)
    for first in range(0, len(tasks), size):
        yield from automatic_records(setting, form, tasks[first : first + size])


def run_record(trial: Trial) -> Record:
    plan = trial.run.plan
    return {
        "kind": "run", **trial.task.describe(), "multiple": trial.multiple, "rate": plan.learning_rate,
        "total_steps": plan.total_steps, "finish": trial.run.progress.finish_reason, "points": trial.points,
    }  # fmt: skip
