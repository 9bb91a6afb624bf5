"""How many files and functions of our own code do one request and one training job cross?

    python -m benchmarks.walks [--root CHECKOUT] [--walk chat completion job] [--list] [--json FILE]

Starts `service.local` with the bundled model, a real store, engine and trainer, and records which functions
each process enters: per request from before it is sent until shortly after its last byte, per job in the
API process until the POST is answered and in the trainer until the job has succeeded. Each walk runs once
before it is recorded, so that work on first use does not count.

A function counts once, however often and in however many processes it is entered, if every repetition enters
it. What API process and engine enter without any work (heartbeats, polls, statistics) does not count, unless
the walk enters it many times as often. Not counted either: libraries, code that dataclasses generate,
imports, and lambdas, comprehensions and generator expressions, which belong to the function around them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import print_table, save
from benchmarks.walks.counting import Walk, count_walk
from benchmarks.walks.stack import RecordingStack, recording_stack

ROOT = Path(__file__).resolve().parents[2]
#: More than a block of the KV cache has room for, with the prompt.
MAX_TOKENS = 16
MESSAGES = [{"role": "user", "content": "Define love."}]
CHAT = {"messages": MESSAGES, "max_tokens": MAX_TOKENS, "stream": True}
COMPLETION = {"prompt": "Once upon a time", "max_tokens": MAX_TOKENS}
NUM_EXAMPLES = 24
#: A request is repeated more often: it is short, and a timer falls into some repetitions and not into others.
REPEATS = {"chat": 20, "completion": 20, "job": 4}
IDLE_S = 5.0
#: What a request leaves behind (metrics, closed generators) is done so long after its last byte.
SETTLE_S = 0.05


class Walks:
    """Runs walks on a stack that is ready."""

    def __init__(self, stack: RecordingStack) -> None:
        self._stack = stack
        self._model: str = stack.get("/v1/models")["data"][0]["id"]

    def run(self, name: str, number: int) -> None:
        """One walk, recorded under that number; 0: not recorded."""
        if name == "job":
            self._run_job(number)
        elif name == "chat":
            self._request(number, "/v1/chat/completions", CHAT)
        else:
            self._request(number, "/v1/completions", COMPLETION)

    def idle(self, number: int) -> None:
        """Some time without work, recorded; but a trainer's wait for a job is part of the job's walk."""
        self._stack.record(number, ("api", "engine"))
        time.sleep(IDLE_S)
        self._stack.record(0, ())

    def _request(self, number: int, path: str, body: dict[str, Any]) -> None:
        self._stack.record(number, ("api", "engine"))
        self._stack.post(path, {"model": self._model, **body})
        time.sleep(SETTLE_S)
        self._stack.record(0, ())

    def _run_job(self, number: int) -> None:
        answers = [f"A word, {i} times." for i in range(NUM_EXAMPLES)]
        lines = [
            json.dumps({"messages": [*MESSAGES, {"role": "assistant", "content": text}]}) for text in answers
        ]
        body = {
            "model": self._model,
            "training_file": self._stack.upload(lines),
            "suffix": f"walk-{number}",
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        }
        self._stack.record(number, ("api", "trainer"))
        job = json.loads(self._stack.post("/v1/fine_tuning/jobs", body))
        self._stack.record(number, ("trainer",))  # asking for the state of the job is not part of the walk
        self._stack.wait_for_job(job["id"])
        self._stack.record(0, ())


def measure(root: Path, names: Sequence[str]) -> list[Walk]:
    """Run these walks with the code of a checkout, and count them."""
    with tempfile.TemporaryDirectory(prefix="tessera-walks-") as folder:
        with recording_stack(root, Path(folder)) as stack:
            walks = Walks(stack)
            for name in names:
                walks.run(name, 0)
            walks.idle(1)
            unused = itertools.count(2)
            numbers = {name: list(itertools.islice(unused, REPEATS[name])) for name in names}
            for name in names:
                for number in numbers[name]:
                    walks.run(name, number)
        found = stack.recordings()
    return [count_walk(name, [found[number] for number in numbers[name]], found[1]) for name in names]


def print_entries(walk: Walk) -> None:
    """The functions in the order of their first entry, indented by their depth on the stack."""
    print(f"\n{walk.name}: {len(walk.files)} files, {len(walk.functions)} functions\n")
    for entry in walk.entries:
        place = f"{entry.file}:{entry.line} {entry.function}"
        print(f"{entry.role:8}{entry.thread[:14]:16}{'  ' * entry.depth}{place}")
    print()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose code is walked")
    parser.add_argument("--walk", nargs="+", choices=list(REPEATS), default=list(REPEATS))
    parser.add_argument("--list", action="store_true", help="print the functions in the order of their entry")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments()
    walks = measure(arguments.root.resolve(), arguments.walk)
    if arguments.list:
        for walk in walks:
            print_entries(walk)
    rows = [row for walk in walks for row in walk.to_rows()]
    print_table(rows)
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments), rows=rows)


if __name__ == "__main__":
    main()
