"""What do the defaults reach on everyday tasks of a real model, and what could a sweep of rates reach?

    python -m benchmarks.real --model DIR --methods lora,lora_xs,lora_sb,population,full --out DIR
    python -m benchmarks.real --model DIR --tasks all --fast --out DIR       # over 20 data sets
    python -m benchmarks.real --model DIR --rates --fast --out DIR           # the learning-rate tables anew
    python -m benchmarks.real --report --out DIR                             # the report again

Tasks are made by a seed (`tasks/`); --data adds files of chat examples. Every method trains each task at
fixed multiples of the tables' rate, co-trained, and once as a job with the defaults does (`auto`). Records
appear in DIR as they are measured, with the whole history of every run: losses and exact matches on what was
held back and on the test. A second call with the same DIR goes on where the first ended. It needs torch and
transformers, and neither the service's packages nor a store.

To bring a model to a machine that only takes files of limited size, from a folder DIR in transformers' format
(`python -m examples.base_models smollm2` prints one; 269 MB become 3 parts in a few minutes):

    tar -C DIR -cJ . | split -b 60M - parts/weights.
    cat parts/weights.* | tar -xJ -C DIR              # there
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.records import RecordFile, read_records
from benchmarks.real.encoded import EncodedTask, encode_population, encode_task
from benchmarks.real.methods import FULL, Method
from benchmarks.real.rates import rate_rows, rates_table
from benchmarks.real.report import report, rows_of
from benchmarks.real.runs import Setting
from benchmarks.real.sweep import base_records, sweep
from benchmarks.real.tasks import ALL, MAIN, crowd, make_tasks, read_task
from benchmarks.report import hardware
from tessera.chat.chat_format import load_chat_format
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput
from tessera.methods.bases import Population
from tessera.model.base_model import load_base_model
from tessera.model.files import model_name

RUN_FILE, RECORDS_FILE, MARKDOWN_FILE, JSON_FILE = "run.json", "records-0.jsonl", "real.md", "real.json"
METHODS = "lora,lora_xs,lora_sb,population,full"
RATE_METHODS, RATE_RANKS = "lora_xs,lora_sb,population", "4,16,64"
#: Trained numbers at once, of about 20 bytes each.
CPU_NUMBERS, GPU_NUMBERS = 60_000_000, 1_500_000_000
CPU_TOKENS, GPU_TOKENS = 2048, 32_768


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(given)
    if not arguments.report:
        arguments.out.mkdir(parents=True, exist_ok=True)
        measure(arguments, given)
    return write_report(arguments.out)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(BUNDLED_MODEL))
    add("--tasks", help=f"main ({', '.join(MAIN)}), all ({len(ALL)}), none, or names with commas between")
    add("--data", type=Path, nargs="+", default=[], help="files that become tasks judged by loss")
    add("--data-train", type=int, default=60, help="examples of each file to train on")
    add("--data-test", type=int, default=30, help="examples of each file to judge by")
    add("--methods", help=f"names with commas between; {METHODS}")
    add("--ranks", help="with commas between; 16")
    add("--rates", action="store_true", help=f"{RATE_METHODS} at ranks {RATE_RANKS} on all tasks")
    add("--multiples", default="0.1,0.3,1,3,10,30", help="of the tables' rate")
    add("--seed", type=int, default=0, help="of the tasks and of training")
    add("--users", type=int, default=40, help="from whom the population's basis is learned")
    add("--passes", type=float, help="over the population's examples; the method's default")
    add("--epochs", type=int, help="for all jobs; chosen as the service does")
    add("--fast", action="store_true", help="training passes may use TF32")
    add("--device", default="auto")
    add("--budget-s", type=float, default=float("inf"), help="begin no method later than this")
    add("--out", type=Path, required=True)
    add("--report", action="store_true", help="only write the report of what is in --out")
    arguments = parser.parse_args(argv)
    arguments.methods = arguments.methods or (RATE_METHODS if arguments.rates else METHODS)
    arguments.ranks = arguments.ranks or (RATE_RANKS if arguments.rates else "16")
    arguments.tasks = arguments.tasks or ("all" if arguments.rates else "main")
    try:
        arguments.methods = [Method.of(name) for name in arguments.methods.split(",")]
        arguments.ranks = [int(rank) for rank in arguments.ranks.split(",")]
        arguments.multiples = tuple(float(multiple) for multiple in arguments.multiples.split(","))
        groups = {"main": MAIN, "all": ALL, "none": ()}
        arguments.tasks = groups.get(arguments.tasks, tuple(arguments.tasks.split(",")))
        if unknown := set(arguments.tasks) - set(ALL):
            parser.error(f"unknown tasks {', '.join(sorted(unknown))}; known: {', '.join(ALL)}")
    except (InvalidInput, ValueError) as error:
        parser.error(str(error))
    return arguments


def measure(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    """Do what is not done yet, method by method."""
    started = time.perf_counter()
    torch.set_float32_matmul_precision("highest")
    chat = load_chat_format(arguments.model)
    tasks = [encode_task(task, chat) for task in make_tasks(arguments.tasks, seed=arguments.seed)]
    sizes = {"num_train": arguments.data_train, "num_test": arguments.data_test}
    tasks += [encode_task(read_task(path, seed=arguments.seed, **sizes), chat) for path in arguments.data]
    base = load_base_model(arguments.model, device=arguments.device, dtype="float32")
    is_gpu = base.device.type != "cpu"
    setting = Setting(
        base,
        GPU_TOKENS if is_gpu else CPU_TOKENS,
        is_fast=arguments.fast,
        multiples=arguments.multiples,
        hyperparameters={} if arguments.epochs is None else {"n_epochs": arguments.epochs},
        seed=arguments.seed,
        max_numbers=GPU_NUMBERS if is_gpu else CPU_NUMBERS,
    )
    describe(arguments, given)
    names = [task.name for task in tasks]
    shared = [list(arguments.multiples), arguments.epochs, arguments.seed, arguments.fast]
    done = {record["cell"] for record in read_records(arguments.out) if record["kind"] == "cell"}
    records = RecordFile(arguments.out / RECORDS_FILE)
    for record in base_records(setting, tasks):
        records.add(record.pop("kind"), record)
    population = None
    for method in arguments.methods:
        for rank in [0] if method.name == FULL else arguments.ranks:
            cell = json.dumps([method.name, rank, names, *shared])
            if cell in done:
                continue
            if time.perf_counter() - started > arguments.budget_s:
                print(f"{method.name}, rank {rank}: not begun, the time is over", flush=True)
                continue
            if method.needs_population and population is None:
                population = encode_population(crowd(arguments.users, seed=arguments.seed), chat)
            perform(setting, method, rank, tasks, population, arguments.passes, records)
            records.add("cell", {"cell": cell})
    records.close()


def perform(
    setting: Setting,
    method: Method,
    rank: int,
    tasks: Sequence[EncodedTask],
    population: Population | None,
    passes: float | None,
    records: RecordFile,
) -> None:
    """Measure one method at one rank, and say how long it took."""
    started = time.perf_counter()
    for record in sweep(setting, method, rank, tasks, population, passes=passes):
        records.add(record.pop("kind"), record)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{method.name}, rank {rank}: {time.perf_counter() - started:.1f} s", flush=True)


def describe(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    """Write what all records share. Of paths only the last parts are kept."""
    shown = [Path(word).name if "/" in word else word for word in given]
    run = {
        "hardware": hardware(),
        "model": model_name(arguments.model),
        "command": " ".join(["python -m benchmarks.real", *shown]),
        "seed": arguments.seed,
        "users": arguments.users,
        "is_fast": arguments.fast,
    }
    (arguments.out / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n")


def write_report(out: Path) -> int:
    """Write the report and its rows, and print it."""
    run: dict[str, Any] = json.loads((out / RUN_FILE).read_text())
    records = list(read_records(out))
    rows, rates = rows_of(records), rate_rows(records)
    text = report(run, rows) + "\n## The best multiple of the tables' rate\n\n" + rates_table(rates)
    (out / MARKDOWN_FILE).write_text(text, encoding="utf-8")
    content = {**run, "rows": [row.to_json() for row in rows], "rates": [rate.to_json() for rate in rates]}
    (out / JSON_FILE).write_text(json.dumps(content, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
