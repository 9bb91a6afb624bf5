"""One method at one rank on all tasks: the automatic choice beside fixed multiples of the tables' rate.

All runs of one basis are co-trained, so a sweep costs little more than its tokens. Yields records of kind
"base", "build", "run" (a fixed rate, with its whole history) and "auto" (what a job with the defaults
publishes).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from benchmarks.real.automatic import Gather, MakeRun, automatic_records
from benchmarks.real.encoded import EncodedTask
from benchmarks.real.full import full_records
from benchmarks.real.judge import judge
from benchmarks.real.methods import Built, Method, build
from benchmarks.real.runs import Setting, Trial, plan_of, train
from benchmarks.real.selection import Record
from tessera.methods.bases import Population
from tessera.methods.forms import LORA_PRESETS
from trainer_worker.training.learning_rates import LoraKind
from trainer_worker.training.lora.factors import LoraFactors, initial_factors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer
from trainer_worker.training.plan import HasLearningRate, TrainingPlan
from trainer_worker.training.run import TrainRun
from trainer_worker.training.trainer import CoreRun, Trainer

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


def sweep(
    setting: Setting,
    method: Method,
    rank: int,
    tasks: Sequence[EncodedTask],
    population: Population | None,
    *,
    passes: float | None = None,
) -> Iterator[Record]:
    """Train `method` at `rank` on all tasks. population: what a learned basis is built from."""
    if method.form == "full":
        records = full_records(setting, tasks)
    elif method.form == "lora":
        records = _lora(setting, method, rank, tasks)
    else:
        records = _core(setting, method, rank, tasks, population, passes)
    for record in records:
        yield {**record, "method": method.name, "rank": rank}


def _core(
    setting: Setting, method: Method, rank: int, tasks: Sequence[EncodedTask],
    population: Population | None, passes: float | None,
) -> Iterator[Record]:  # fmt: skip
    groups = [list(tasks)] if method.is_shared else [[task] for task in tasks]
    for group in groups:
        examples = (
            population if method.needs_population else None if method.is_shared else group[0].calibration
        )
        built = build(
            setting.base, method, rank, examples, token_budget=setting.token_budget, is_fast=setting.is_fast,
            passes=passes,
        )  # fmt: skip
        basis = built.basis
        yield {
            "kind": "build", "tasks": [task.name for task in group], "seconds": built.seconds,
            "gain": built.kind.gain,
        }  # fmt: skip

        def make(run_id: str, task: EncodedTask, plan: TrainingPlan, built: Built = built) -> CoreRun:
            return CoreRun(run_id, task.data, plan, built.basis, start=built.start(task, plan))

        def gather(runs: Sequence[TrainRun], built: Built = built) -> Trainer:
            trainer = Trainer(
                setting.base, built.basis, max_runs=len(runs), token_budget=setting.token_budget
            )
            for run in runs:
                assert isinstance(run, CoreRun)
                trainer.join(run)
            return trainer

        num_parameters = basis.num_modules * basis.rank**2
        yield from _trials(setting, group, built.kind, make, gather, num_parameters)


def _lora(setting: Setting, method: Method, rank: int, tasks: Sequence[EncodedTask]) -> Iterator[Record]:
    preset = LORA_PRESETS[method.lora_preset]
    found: dict[str, LoraFactors] = {}
    kind = LoraKind(preset.name, rank)

    def make(run_id: str, task: EncodedTask, plan: TrainingPlan) -> LoraRun:
        name = "" if preset.method is None else task.name
        if name not in found:
            found[name] = initial_factors(
                setting.base, preset, rank=rank, calibration=task.calibration if name else None,
                seed=setting.seed,
            )  # fmt: skip
        return LoraRun(run_id, task.data, plan, found[name])

    def gather(runs: Sequence[TrainRun]) -> LoraTrainer:
        minimum = 0 if setting.base.device.type == "cpu" else setting.token_budget
        mine = [run for run in runs if isinstance(run, LoraRun)]
        return LoraTrainer(setting.base, mine, token_budget=setting.token_budget, min_tokens=minimum)

    # One run's factors tell how many numbers are trained.
    probe = make("", tasks[0], plan_of(setting, tasks[0], kind, None))
    assert isinstance(probe, LoraRun)
    yield from _trials(setting, tasks, kind, make, gather, probe.factors.num_trained)


def _trials(
    setting: Setting,
    tasks: Sequence[EncodedTask],
    kind: HasLearningRate,
    make: MakeRun,
    gather: Gather,
    num_parameters: int,
) -> Iterator[Record]:
    """Train every multiple of every task, and the automatic choice, together as far as memory allows."""
    trials = []
    for task in tasks:
        for multiple in setting.multiples:
            plan = plan_of(setting, task, kind, multiple)
            trials.append(Trial(make(f"{task.name}/{multiple:g}", task, plan), task, multiple))
    size = max(1, setting.max_numbers // num_parameters)
    for first in range(0, len(trials), size):
        part = trials[first : first + size]
        started = time.perf_counter()
        trainer = gather([trial.run for trial in part])
        train(setting, trainer, part)
        seconds = time.perf_counter() - started
        shared = {"num_parameters": num_parameters, "seconds_together": seconds, "num_together": len(part)}
        yield from ({**run_record(trial), **shared} for trial in part)
    size = max(1, size // MAX_RUNS_PER_CHOICE)
    for first in range(0, len(tasks), size):
        yield from automatic_records(setting, tasks[first : first + size], kind, make, gather)


def run_record(trial: Trial) -> Record:
    plan = trial.run.plan
    return {
        "kind": "run", **trial.task.describe(), "multiple": trial.multiple, "rate": plan.learning_rate,
        "total_steps": plan.total_steps, "finish": trial.run.progress.finish_reason, "points": trial.points,
    }  # fmt: skip
