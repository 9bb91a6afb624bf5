"""What a job that leaves the learning rate to the service trains and publishes.

The one place of the benchmark that calls the worker's own choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.real.encoded import EncodedTask
from benchmarks.real.runs import Setting, SharedTrainer, Trial, measure, plan_of
from benchmarks.real.selection import Record
from trainer_worker.training.plan import HasLearningRate, TrainingPlan
from trainer_worker.training.run import TrainRun

#: From an id, a task and a plan to a run that trains the task.
MakeRun = Callable[[str, EncodedTask, TrainingPlan], TrainRun]
#: From runs to a trainer in which they are resident, in their order.
Gather = Callable[[Sequence[TrainRun]], SharedTrainer]


def automatic_records(
    setting: Setting, tasks: Sequence[EncodedTask], kind: HasLearningRate, make: MakeRun, gather: Gather
) -> Iterator[Record]:
    """Train each task as a job with the defaults, and judge the state that it publishes.

    `multiple` is the chosen rate by the rate of the tables. `seconds_together` is the time of all tasks.
    """
    trials = []
    for task in tasks:
        plan = plan_of(setting, task, kind, None)
        trials.append(Trial(make(f"{task.name}/auto", task, plan), task, None))
    started = time.perf_counter()
    trainer = gather([trial.run for trial in trials])
    while not all(trial.run.is_finished for trial in trials):
        trainer.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        for trial in trials:
            trial.run.R.copy_(trial.run.best_R)
    for trial, point in measure(setting, trainer.attached, list(enumerate(trials))):
        run, table_rate = trial.run, kind.rate_for(trial.task.data.num_train)
        yield {
            "kind": "auto", **trial.task.describe(), "multiple": run.plan.learning_rate / table_rate,
            "rate": run.plan.learning_rate, "step": run.progress.best_step,
            "finish": run.progress.finish_reason, "seconds_together": seconds, "num_together": len(trials),
            **point,
        }  # fmt: skip
