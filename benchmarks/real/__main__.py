"""What do the defaults reach on everyday tasks of a real model, and what could a sweep of rates reach?

    python -m benchmarks.real --model DIR --methods lora,lora_xs,lora_sb,population,full --out DIR
    python -m benchmarks.real --model DIR --tasks all --fast --out DIR       # over 20 data sets
    python -m benchmarks.real --model DIR --rates --fast --out DIR           # the learning-rate tables anew
    python -m benchmarks.real --model DIR --cost --methods lora_xs --out DIR # a search against one run
    python -m benchmarks.real --report --out DIR                             # the report again

Tasks are made by a seed (`tasks/`); --data adds files of chat examples. NAME.train.jsonl comes with a
NAME.test.jsonl, other files are divided. Every method trains each task at fixed multiples of the tables'
rate, co-trained, and once as a job with the defaults does (`auto`). Records appear in DIR as they are
measured, with the whole history of every run: losses and exact matches on what was held back and on the
test. A second call with the same DIR goes on where the first ended. It needs torch and transformers, and
neither the service's packages nor a store.

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
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.records import RecordFile, read_records
from benchmarks.real.encoded import EncodedTask, encode_population, encode_task
from benchmarks.real.methods import FULL, Method
from benchmarks.real.rates import rate_rows, rates_table
from benchmarks.real.report import cost_table, report, rows_of, search_table
from benchmarks.real.rules import rule_rows, rules_table
from benchmarks.real.runs import Setting
from benchmarks.real.sweep import Cell, base_records, perform
from benchmarks.real.tasks import ALL, MAIN, SIZES, crowd, make_tasks, read_task
from benchmarks.report import hardware
from tessera.chat.chat_format import ChatFormat, load_chat_format
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput, TesseraError
from tessera.model.base_model import load_base_model
from tessera.model.files import model_name

RUN_FILE, RECORDS_FILE, MARKDOWN_FILE, JSON_FILE = "run.json", "records-0.jsonl", "real.md", "real.json"
METHODS = "lora,lora_xs,lora_sb,population,full"
RATE_METHODS, RATE_RANKS = "lora_xs,lora_sb,population", "4,16,64"
#: Trained numbers at once, of about 20 bytes each.
CPU_NUMBERS, GPU_NUMBERS = 60_000_000, 1_500_000_000
CPU_TOKENS, GPU_TOKENS = 2048, 16_384


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
    add(
        "--tasks",
        help=f"main ({', '.join(MAIN)}), sizes ({len(SIZES)}), all ({len(ALL)}), none, or names with commas",
    )
    add("--data", type=Path, nargs="+", default=[], help="files that become tasks judged by loss")
    add("--exact-data", type=Path, nargs="+", default=[], help="the same, judged by exact match, too")
    add("--data-train", type=int, default=60, help="examples of each file to train on")
    add("--data-test", type=int, default=30, help="examples of each file to judge by")
    add("--methods", help=f"names with commas between; {METHODS}")
    add("--ranks", help="with commas between; 16")
    add("--rates", action="store_true", help=f"only fixed rates, of {RATE_METHODS} at ranks {RATE_RANKS}")
    add("--cost", action="store_true", help="only time a job with the defaults against one run, each alone")
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
    default_methods = RATE_METHODS if arguments.rates or arguments.cost else METHODS
    arguments.methods = arguments.methods or default_methods
    arguments.ranks = arguments.ranks or (RATE_RANKS if arguments.rates else "16")
    arguments.tasks = arguments.tasks or ("sizes" if arguments.rates else "main")
    arguments.measures = "cost" if arguments.cost else "rates" if arguments.rates else "all"
    try:
        arguments.methods = [Method.of(name) for name in arguments.methods.split(",")]
        if arguments.cost and any(method.form == FULL for method in arguments.methods):
            parser.error("full fine-tuning has no search whose cost could be measured")
        arguments.ranks = [int(rank) for rank in arguments.ranks.split(",")]
        arguments.multiples = tuple(float(multiple) for multiple in arguments.multiples.split(","))
        groups = {"main": MAIN, "sizes": SIZES, "all": ALL, "none": ()}
        arguments.tasks = groups.get(arguments.tasks, tuple(arguments.tasks.split(",")))
        if unknown := set(arguments.tasks) - set(ALL):
            parser.error(f"unknown tasks {', '.join(sorted(unknown))}; known: {', '.join(ALL)}")
    except (InvalidInput, ValueError) as error:
        parser.error(str(error))
    return arguments


def measure(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    """Do what is not done yet, one method at one rank after the other."""
    started = time.perf_counter()
    chat = load_chat_format(arguments.model)
    try:
        tasks = encode_tasks(arguments, chat)
    except (TesseraError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    setting = make_setting(arguments)
    describe(arguments, given)
    same = [[task.name for task in tasks], list(arguments.multiples), arguments.epochs, arguments.seed]
    done = {record["cell"] for record in read_records(arguments.out) if record["kind"] == "cell"}
    with closing(RecordFile(arguments.out / RECORDS_FILE)) as records:
        for record in base_records(setting, tasks):
            records.add(record.pop("kind"), record)
        population = None
        for method, rank in cells(arguments):
            key = json.dumps([method.name, rank, *same, arguments.fast, arguments.measures])
            begun = time.perf_counter()
            if key in done:
                continue
            if begun - started > arguments.budget_s:
                print(f"{method.name}, rank {rank}: not begun, the time is over", flush=True)
                continue
            if method.needs_population and population is None:
                population = encode_population(crowd(arguments.users, seed=arguments.seed), chat)
            examples = population if method.needs_population else None
            cell = Cell(method, rank, examples, arguments.passes, arguments.measures)
            for record in perform(setting, cell, tasks):
                records.add(record.pop("kind"), record)
            records.add("cell", {"cell": key})
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(f"{method.name}, rank {rank}: {time.perf_counter() - begun:.1f} s", flush=True)


def cells(arguments: argparse.Namespace) -> Iterator[tuple[Method, int]]:
    """Yield the methods with their ranks; full fine-tuning has none."""
    for method in arguments.methods:
        for rank in [0] if method.form == FULL else arguments.ranks:
            yield method, rank


def encode_tasks(arguments: argparse.Namespace, chat: ChatFormat) -> list[EncodedTask]:
    """Return the chosen tasks and those of the files."""
    sizes = {"num_train": arguments.data_train, "num_test": arguments.data_test}
    tasks = make_tasks(arguments.tasks, seed=arguments.seed)
    tasks += [read_task(path, seed=arguments.seed, **sizes) for path in arguments.data]
    for path in arguments.exact_data:
        tasks.append(read_task(path, seed=arguments.seed, judged="exact", **sizes))
    return [encode_task(task, chat) for task in tasks]


def make_setting(arguments: argparse.Namespace) -> Setting:
    """Load the model, and return what is the same for all methods."""
    torch.set_float32_matmul_precision("highest")
    base = load_base_model(arguments.model, device=arguments.device, dtype="float32")
    is_gpu = base.device.type != "cpu"
    return Setting(
        base,
        GPU_TOKENS if is_gpu else CPU_TOKENS,
        is_fast=arguments.fast,
        multiples=arguments.multiples,
        hyperparameters={} if arguments.epochs is None else {"n_epochs": arguments.epochs},
        seed=arguments.seed,
        max_numbers=GPU_NUMBERS if is_gpu else CPU_NUMBERS,
    )


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
    parts = [report(run, rows), search_table(records), cost_table(records), rules_table(rule_rows(records))]
    if rates:
        parts.append("## The best multiple of the tables' rate\n\n" + rates_table(rates))
    text = "\n".join(filter(None, parts))
    (out / MARKDOWN_FILE).write_text(text, encoding="utf-8")
    content = {**run, "rows": [row.to_json() for row in rows], "rates": [rate.to_json() for rate in rates]}
    content["costs"] = [record for record in records if record["kind"] == "cost"]
    (out / JSON_FILE).write_text(json.dumps(content, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
