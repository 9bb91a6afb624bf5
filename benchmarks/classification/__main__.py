"""Accuracy of a head alone and of cores with a head, by learning rate: `python -m benchmarks.classification`.

All runs of one task are trained together, as the users of a service would be. The validation data of a run
are split off its training file, as in a job, and its best state is tested on texts that training did not see.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.classification.tasks import REGRESSIONS, TASKS, make_files
from benchmarks.report import hardware
from tessera.chat.chat_format import ChatFormat, load_chat_format
from tessera.defaults import BUNDLED_MODEL
from tessera.formats.basis import Basis
from tessera.formats.head import CLASSIFICATION, REGRESSION
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel, load_base_model
from tessera.model.pooling import hidden_width
from trainer_worker.training.classification.data import LabelledData, read_labelled
from trainer_worker.training.classification.run import ClassificationRun
from trainer_worker.training.learning_rates import BasisKind
from trainer_worker.training.plan import make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BUNDLED_MODEL))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--num-train", type=int, default=200)
    parser.add_argument("--num-test", type=int, default=200)
    parser.add_argument("--head-rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--multipliers", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load_base_model(options.model)
    basis, chat = build_basis(base, rank=options.rank), load_chat_format(options.model)
    records = []
    for task in options.tasks:
        for seed in options.seeds:
            for record in _measure(base, basis, chat, task, seed, options):
                print(json.dumps(record), flush=True)
                records.append(record)
    if options.out is not None:
        options.out.write_text(json.dumps({"hardware": hardware(), "records": records}, indent=1) + "\n")


def _measure(
    base: BaseModel, basis: Basis, chat: ChatFormat, task: str, seed: int, options: argparse.Namespace
) -> list[dict[str, object]]:
    training, test = make_files(task, num_train=options.num_train, num_test=options.num_test, seed=seed)
    kind = REGRESSION if task in REGRESSIONS else CLASSIFICATION
    labelled = read_labelled(chat, training, None, problem_type=kind, max_tokens=256)
    tested = read_labelled(chat, training, test, problem_type=kind, max_tokens=256)
    runs = {}
    for head_rate in options.head_rates:
        for multiplier in [0.0, *options.multipliers]:
            run = _make_run(base, basis, labelled, seed, head_rate=head_rate, multiplier=multiplier)
            runs[multiplier, head_rate] = run
    trainer = next(iter(runs.values())).make_trainer(base, max_runs=len(runs), token_budget=2048)
    for run in list(runs.values())[1:]:
        trainer.join(run)
    while not all(run.is_finished for run in runs.values()):
        trainer.step()
    records = []
    for (multiplier, head_rate), run in runs.items():
        trainer.leave(run.run_id)
        loss, accuracy = _test(base, tested, run)
        records.append(
            {
                "task": task,
                "seed": seed,
                "trained": "cores and head" if multiplier else "head",
                "multiplier": multiplier,
                "head_rate": head_rate,
                "steps": run.progress.step,
                "best_step": run.progress.best_step,
                "valid_loss": run.progress.best_valid_loss,
                "test_loss": loss,
                "test_accuracy": accuracy,
            }
        )
    return records


def _make_run(
    base: BaseModel, basis: Basis, labelled: LabelledData, seed: int, *, head_rate: float, multiplier: float
) -> ClassificationRun:
    """multiplier: of the automatic learning rate of the cores; 0 trains the head alone."""
    chosen = {"learning_rate_multiplier": multiplier} if multiplier else {}
    plan = make_plan(chosen, None, num_examples=labelled.data.num_train, kind=BasisKind.of(basis), seed=seed)
    width = hidden_width(base.model)
    assert width is not None
    return ClassificationRun(
        f"{multiplier} {head_rate}", labelled, plan, basis, width=width, head_rate=head_rate,
        head_only=multiplier == 0,
    )  # fmt: skip


def _test(base: BaseModel, tested: LabelledData, run: ClassificationRun) -> tuple[float, float | None]:
    """Return the loss of the best state on the test file, and its accuracy unless it is a regression."""
    probe = ClassificationRun(
        "test", tested, run.plan, run.basis, width=run.width,
        head_rate=run.head_scale * run.plan.learning_rate, start=run.best_R.float(),
    )  # fmt: skip
    trainer = probe.make_trainer(base, max_runs=1, token_budget=2048)
    [evaluation, *_] = trainer.step()
    assert evaluation.valid_loss is not None
    return evaluation.valid_loss, None if run.is_regression else evaluation.valid_accuracy


if __name__ == "__main__":
    main()
