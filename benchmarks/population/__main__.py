"""How close does a new user who trains only R come to LoRA, with a basis learned from other users?

    python -m benchmarks.population --data FILE.jsonl [FILE.jsonl …] [--new-data FILE.jsonl …] --out DIR
    python -m benchmarks.population --preset h100-150s --model DIR --data … --new-data … --workers 4 \\
        --budget-s 150 --out DIR
    python -m benchmarks.population --report --out DIR       # the report again, from what is in DIR

The files of --data are cut by topic into the users of the population and newcomers; those of --new-data give
newcomers only. Records appear in DIR as they are measured, and a second call with the same DIR goes on where
the first ended. It ends with three files there: run.json, records-0.jsonl and population.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.population.presets import PRESETS, Preset
from benchmarks.population.report import report
from benchmarks.population.tasks import Setting, Task, perform
from benchmarks.population.users import Cast, make_cast, read_files
from benchmarks.quality.records import RecordFile, read_records
from benchmarks.report import hardware
from tessera.chat.chat_format import ChatFormat
from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL
from tessera.model.base_model import load_base_model
from tessera.model.files import model_name
from tessera.processes.child_process import start_child

RUN_FILE, RECORDS_FILE, MARKDOWN_FILE = "run.json", "records-0.jsonl", "population.md"
#: Kept back at the end of the budget for the report, and for a process to end.
RESERVE_S = 6.0
#: A task that would begin later than so many seconds before the end is not begun.
MIN_TASK_S = 12.0


def main(argv: Sequence[str] | None = None) -> int:
    started = time.time()
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(given)
    preset = PRESETS[arguments.preset]
    if arguments.report:
        return write_report(arguments.out)
    if arguments.worker is not None:
        work(arguments, preset)
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.budget_s is not None:
        arguments.deadline = started + arguments.budget_s - RESERVE_S
    with tempfile.TemporaryDirectory() as claims:
        arguments.claims = Path(claims)
        if arguments.workers > 1 or arguments.budget_s is not None:
            run_workers(given, arguments)
        else:
            arguments.worker = 0
            work(arguments, preset)
    return write_report(arguments.out)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.population",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(BUNDLED_MODEL))
    add("--data", type=Path, nargs="+", default=[], help="files of the population and of newcomers")
    add("--new-data", type=Path, nargs="+", default=[], help="files of newcomers only")
    add("--preset", choices=sorted(PRESETS), default="smoke")
    add("--only", nargs="+", default=[], help="only tasks of these names")
    add("--device", default="auto")
    add("--workers", type=int, default=1, help="processes that share the device")
    add("--budget-s", type=float, help="end after so many seconds, whatever is running")
    add("--out", type=Path, required=True)
    add("--report", action="store_true", help="only write the report of what is in --out")
    add("--worker", type=int, help=argparse.SUPPRESS)
    add("--claims", type=Path, help=argparse.SUPPRESS)
    add("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)  # seconds since the epoch
    arguments = parser.parse_args(argv)
    if not arguments.data and not arguments.report:
        parser.error("--data is needed")
    return arguments


def describe(arguments: argparse.Namespace, preset: Preset, casts: dict[str, Cast]) -> None:
    """What the records are of, once for all processes."""
    run = {
        "hardware": hardware(),
        "model": model_name(arguments.model),
        "preset": arguments.preset,
        "workers": arguments.workers,
        "rates": list(preset.rates),
        "lora_rates": list(preset.lora_rates),
        "casts": [cast.describe() for cast in casts.values()],
    }
    (arguments.out / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n")


def make_casts(arguments: argparse.Namespace, preset: Preset) -> dict[str, Cast]:
    """The preset's casts of the files."""
    seen, unseen = [p.stem for p in arguments.data], [p.stem for p in arguments.new_data]
    chat = ChatFormat(load_tokenizer(arguments.model))
    files = read_files([*arguments.data, *arguments.new_data], chat)
    files = {name: examples[: preset.max_examples] for name, examples in files.items()}
    return {
        name: make_cast(
            name,
            files,
            seen=seen[: casting.num_seen],
            unseen=[*(seen[casting.num_seen :] if casting.num_seen else []), *unseen],
            sizes=casting.sizes,
            seeds=casting.seeds,
        )
        for name, casting in preset.casts.items()
    }


def work(arguments: argparse.Namespace, preset: Preset) -> None:
    """This process's share of the tasks: the first that nobody has claimed, and so on."""
    torch.set_float32_matmul_precision("highest")
    casts = make_casts(arguments, preset)
    if arguments.worker == 0:
        describe(arguments, preset, casts)
    base = load_base_model(arguments.model, device=arguments.device, dtype="float32")
    setting = Setting(
        base,
        casts,
        preset.token_budget,
        preset.is_fast,
        preset.rates,
        preset.lora_rates,
    )
    done = {record["digest"] for record in read_records(arguments.out) if record["kind"] == "task"}
    records = RecordFile(arguments.out / RECORDS_FILE)  # opened to append: each line is one write
    for task in preset.tasks:
        if arguments.only and task.name not in arguments.only:
            continue
        if time.time() > arguments.deadline - MIN_TASK_S:
            break
        if task.digest not in done and claim(arguments.claims / task.digest):
            do(task, setting, records, arguments.worker)
    records.close()


def do(task: Task, setting: Setting, records: RecordFile, worker: int) -> None:
    """One task, its records, and a last one that says that it is complete."""
    started = time.perf_counter()
    try:
        for record in perform(task, setting):
            records.add(record.pop("kind"), {"task": task.digest, **record})
    except Exception:  # one task's failure must not cost the others' results
        sys.stdout.write(f"[{worker}] {task.name}: failed\n{traceback.format_exc()}\n")
    else:
        seconds = round(time.perf_counter() - started, 1)
        records.add("task", {"digest": task.digest, "name": task.name, "seconds": seconds})
        sys.stdout.write(f"[{worker}] {task.name}, rank {task.rank}: {seconds} s\n")
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    sys.stdout.flush()


def claim(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def run_workers(given: list[str], arguments: argparse.Namespace) -> None:
    """Several processes over the same list; those that are late are ended, their records are kept."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(2, arguments.workers))),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # what one frees must be there for the others
    }
    common = ["--deadline", str(arguments.deadline), "--claims", str(arguments.claims)]
    command = [sys.executable, "-m", "benchmarks.population", *given, *common]
    processes = [
        start_child([*command, "--worker", str(index)], environment=environment)
        for index in range(arguments.workers)
    ]
    try:
        for process in processes:
            left = arguments.deadline - time.time()
            process.wait(timeout=None if left == float("inf") else max(0.1, left))
    except subprocess.TimeoutExpired:
        sys.stdout.write("time is up; the report is of what was done\n")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def write_report(out: Path) -> int:
    text = report(json.loads((out / RUN_FILE).read_text()), list(read_records(out)))
    (out / MARKDOWN_FILE).write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
