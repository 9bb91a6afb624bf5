"""How good is each method? Best-of-sweep validation loss, orderings T1 to T15, peers; see the package's text.

    python -m benchmarks.quality --data FILE.jsonl [--data …] --out DIR [--methods …] [--ranks …] [--seeds …]
    python -m benchmarks.quality --preset h100-20min --model DIR --data … --workers 4 --budget-s 1200
        --earlier benchmarks/results/quality-h100-small --out DIR
    python -m benchmarks.quality --report --out DIR          # the report again, from what is in DIR
    python -m benchmarks.quality --preset … --data … --out DIR --estimate          # what it would take there

Methods: r x r by name (lora_xs, lora_sb, …), LoRA forms as lora:NAME, PEFT's as peft:NAME. The records appear
in DIR as they are measured, and a second call with the same DIR goes on where the first ended; --earlier
takes over what another run with the same settings has measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.costs import estimate_s, finished_after_s
from benchmarks.quality.data import DataSet, load_data, personal_name
from benchmarks.quality.markdown import report
from benchmarks.quality.plots import PlottingMissing, plot
from benchmarks.quality.presets import DEFAULT_METHODS, PRESETS, all_of, with_preset
from benchmarks.quality.records import read_records, take_over
from benchmarks.quality.results import Results
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks import CLAIMS, Worker, waiting_tasks
from benchmarks.quality.work import Task
from benchmarks.report import hardware
from tessera.chat.chat_format import ChatFormat
from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import TesseraError
from tessera.model.base_model import load_base_model
from tessera.model.files import model_name
from tessera.processes.child_process import start_child

#: Kept back at the end of the budget for what is running, and for the report.
REPORT_S = 15.0
#: What runs at the deadline may take so much longer before it is ended.
GRACE_S = 8.0
#: Files of a run in its folder.
RUN_FILE, JSON_FILE, MARKDOWN_FILE, PLOT_FILE = "run.json", "quality.json", "quality.md", "quality.png"


def main(argv: Sequence[str] | None = None) -> int:
    started = time.time()
    arguments = parse(argv)
    try:
        if arguments.report:
            return write_report(arguments)
        settings = settings_of(arguments)
        tasks = tasks_of(arguments)
        deadline = arguments.deadline
        if arguments.budget_s is not None and arguments.worker is None:
            deadline = started + arguments.budget_s - REPORT_S
        if arguments.worker is None:
            prepare(arguments, settings)
        if arguments.estimate:
            return say_estimate(waiting_tasks(tasks, arguments.out, settings), arguments.workers)
        if arguments.worker is None and arguments.workers > 1:
            run_workers(list(sys.argv[1:] if argv is None else argv), arguments, deadline)
        else:
            work(arguments, settings, tasks, deadline)
    except TesseraError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0 if arguments.worker is not None else write_report(arguments)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(BUNDLED_MODEL))
    add("--data", type=Path, action="append", default=[], help="training file; the first is the main one")
    add("--methods", nargs="+", default=list(DEFAULT_METHODS))
    add("--ranks", nargs="+", type=int, default=[4, 16])
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--rates", nargs="+", type=float, default=[], help="of the r x r form; unset: each method's own")
    add("--lora-rates", nargs="+", type=float, default=[], help="of the LoRA forms and of PEFT")
    add("--examples", type=int)
    add("--validation", type=int)
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--token-budget", type=int)
    add("--device", default="auto")
    add("--exact", action="store_true", help="train in full float32 where a preset would take TF32")
    add("--preset", choices=sorted(PRESETS))
    add("--workers", type=int, default=1, help="processes that share the device")
    add("--budget-s", type=float, help="begin nothing that would not fit into so many seconds")
    add("--out", type=Path, required=True)
    add("--json", type=Path)
    add("--markdown", type=Path)
    add("--plot", type=Path)
    add("--report", action="store_true", help="only write the report of what is in --out")
    add("--earlier", type=Path, help="a folder of results whose records count as measured")
    add("--personal", action="store_true", help="also one user's few examples, the first data set's first")
    add("--estimate", action="store_true", help="only say what is left to do, and its seconds on an H100")
    add("--worker", type=int, help=argparse.SUPPRESS)
    add("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)  # seconds since the epoch
    arguments = parser.parse_args(argv)
    if not arguments.data and not arguments.report:
        parser.error("--data is needed")
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The preset's settings, and what was given on top."""
    settings = Settings(arguments.model, arguments.device)
    if arguments.preset:
        settings = with_preset(settings, arguments.preset)
    names = ("examples", "validation", "epochs", "batch_size", "token_budget")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    given |= {name: tuple(getattr(arguments, name)) or None for name in ("rates", "lora_rates")}
    if arguments.exact:
        given["is_fast"] = False
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    data = [path.stem for path in arguments.data]
    if arguments.preset:
        return list(PRESETS[arguments.preset][0](data))
    if arguments.personal:
        data.append(personal_name(data[0]))
    return all_of(arguments.methods, arguments.ranks, arguments.seeds, data)


def say_estimate(tasks: list[Task], workers: int) -> int:
    """What each task takes, and when it is done."""
    for task, end in zip(tasks, finished_after_s(tasks, workers), strict=True):
        sys.stdout.write(f"{estimate_s(task):6.0f} s, done after {end:6.0f} s: {task.name} {task.seeds}\n")
    return 0


def prepare(arguments: argparse.Namespace, settings: Settings) -> None:
    """The folder, with what its records will be of. An earlier try's claims are void, its records are not."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(arguments.out / CLAIMS, ignore_errors=True)
    shown = {**asdict(settings), "model": model_name(settings.model)}
    run = {"hardware": hardware(), "settings": shown, "workers": arguments.workers}
    if arguments.earlier is not None:
        run["earlier"] = take_over(arguments.earlier, arguments.out, settings=shown)
    (arguments.out / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n")


def work(arguments: argparse.Namespace, settings: Settings, tasks: list[Task], deadline: float) -> None:
    """This process's share."""
    torch.set_float32_matmul_precision("highest")
    base = load_base_model(settings.model, device=settings.device, dtype="float32")
    chat = ChatFormat(load_tokenizer(settings.model))
    sets: dict[str, DataSet] = {}
    for path in arguments.data:
        sets[path.stem] = load_data(
            path,
            chat,
            examples=settings.examples,
            validation=settings.validation,
            max_tokens=settings.max_tokens,
            by_length=settings.by_length,
        )
    sets |= {own.name: own for own in [item.personal() for item in sets.values()]}
    worker = Worker(base, sets, settings, arguments.out, index=arguments.worker or 0)
    worker.run(tasks, deadline=deadline)


def run_workers(argv: list[str], arguments: argparse.Namespace, deadline: float) -> None:
    """Several processes over the same list; those that are late are ended, their records are kept."""
    cores = max(1, (os.cpu_count() or 1) // arguments.workers)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(cores),
        # What one process frees must be there for the others.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    command = [sys.executable, "-m", "benchmarks.quality", *argv]
    processes = []
    for index in range(arguments.workers):
        own = ["--worker", str(index), "--deadline", str(deadline)]
        processes.append(start_child([*command, *own], environment=environment))
    try:
        for process in processes:
            try:
                left = deadline + GRACE_S - time.time()
                process.wait(timeout=None if math.isinf(left) else max(1.0, left))
            except subprocess.TimeoutExpired:
                sys.stdout.write("time is up; the report is of what was done\n")
                break
    finally:
        for process in processes:
            process.kill()
            process.wait()


def write_report(arguments: argparse.Namespace) -> int:
    """JSON, Markdown and the plot of what is in the folder."""
    out = arguments.out
    shutil.rmtree(out / CLAIMS, ignore_errors=True)
    run = json.loads((out / RUN_FILE).read_text())
    records = list(read_records(out))
    results = Results(records)
    document = {**run, "base": results.base, "records": [r for r in records if r["kind"] != "task"]}
    (arguments.json or out / JSON_FILE).write_text(json.dumps(document, separators=(",", ":")) + "\n")
    text = report(results, hardware=run["hardware"], settings=run["settings"])
    (arguments.markdown or out / MARKDOWN_FILE).write_text(text, encoding="utf-8")
    try:
        plot(results, arguments.plot or out / PLOT_FILE)
    except PlottingMissing as error:
        sys.stderr.write(f"{error}\n")
    sys.stdout.write(f"{len(results.runs)} runs; report: {arguments.markdown or out / MARKDOWN_FILE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
