"""What a job that leaves the learning rate to the service publishes, and what its search costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from benchmarks.quality.settings import synchronize
from benchmarks.real.encoded import EncodedTask
from benchmarks.real.forms import Form
from benchmarks.real.runs import Setting, Trial, measure, plan_of
from benchmarks.real.selection import Record
from trainer_worker.training.run import TrainRun
from trainer_worker.training.search.search_run import SearchRun

#: Timed repetitions of a cost, after one that warms up; the fastest counts.
REPEATS = 2


def automatic_records(setting: Setting, form: Form, tasks: Sequence[EncodedTask]) -> Iterator[Record]:
    """Train each task as a job with the defaults, all together, and judge what is published.

    `multiple` is the chosen rate by the rate of the tables; `search` has the candidates of a search.
    """
    runs = [form.automatic(f"{task.name}/auto", task) for task in tasks]
    trainer = form.gather(runs)
    while not all(run.is_finished for run in runs):
        trainer.step()
    published = [form.published(run, task) for run, task in zip(runs, tasks, strict=True)]
    trials = [Trial(run, task, None) for run, task in zip(published, tasks, strict=True)]
    judged = form.gather(published)
    points = measure(setting, judged.attached, list(enumerate(trials)))
    for run, (trial, point) in zip(runs, points, strict=True):
        rate, table = run.published_plan.learning_rate, run.plan.automatic_rate
        assert table is not None
        yield {
            "kind": "auto", **trial.task.describe(), "multiple": rate / table, "rate": rate,
            "step": run.published_step, "finish": run.progress.finish_reason, **point,
            "search": run.search_report if isinstance(run, SearchRun) else None,
        }  # fmt: skip


def cost_records(setting: Setting, form: Form, tasks: Sequence[EncodedTask]) -> Iterator[Record]:
    """Train each task alone, once at the rate of the tables and once as a job with the defaults."""
    for task in tasks:
        seconds: dict[str, list[float]] = {"one": [], "auto": []}
        steps = {}
        for repeat in range(REPEATS + 1):
            one = form.make(f"{task.name}/one", task, plan_of(setting, task, form.kind, None))
            for name, run in (("one", one), ("auto", form.automatic(f"{task.name}/auto", task))):
                spent = _seconds_alone(form, run)
                steps[name] = run.progress.step
                if repeat:
                    seconds[name].append(spent)
        fastest = {name: min(times) for name, times in seconds.items()}
        yield {
            "kind": "cost", **task.describe(), "seconds_one": fastest["one"], "seconds_auto": fastest["auto"],
            "steps_one": steps["one"], "steps_auto": steps["auto"], "ratio": fastest["auto"] / fastest["one"],
        }  # fmt: skip


def _seconds_alone(form: Form, run: TrainRun) -> float:
    trainer = form.gather([run])
    synchronize()
    started = time.perf_counter()
    while not run.is_finished:
        trainer.step()
    synchronize()
    return time.perf_counter() - started
