"""Judge every causal architecture of the installed transformers, tiny and random, each in its own process.

    python -m benchmarks.architectures                           all of them: 5 minutes on one core
    python -m benchmarks.architectures --output a.jsonl phi3 gpt2
    python -m benchmarks.architectures --write                   all, and docs/architectures.md

Prints a table and the counts; `--output` takes a line of JSON per type as soon as it is known. Exit status 1
if a model is served wrongly or breaks the engine.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from benchmarks.architectures.document import write
from benchmarks.architectures.exactness import OUTCOMES, Verdict, judge
from benchmarks.architectures.tiny_models import model_types

#: Of one type, on a core that others use too; it takes 1 to 3 s alone.
TIMEOUT_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types of transformers; none: all")
    parser.add_argument("--output", type=Path, help="JSON lines, one per type")
    parser.add_argument("--write", action="store_true", help="keep the verdicts, and write the docs' page")
    arguments = parser.parse_args()
    if arguments.write and arguments.types:
        parser.error("--write is for all types")
    _be_quiet()
    if arguments.output is not None:
        arguments.output.write_text("")
    verdicts = []
    for verdict in judge_apart(arguments.types or model_types()):
        verdicts.append(verdict)
        print(f"| {' | '.join(cells(verdict))} |", flush=True)
        if arguments.output is not None:
            with arguments.output.open("a") as file:
                file.write(json.dumps(verdict.to_map()) + "\n")
    if arguments.write:
        write(verdicts)
    counts = Counter(verdict.outcome for verdict in verdicts)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES))
    return 1 if counts["wrong"] or counts["crash"] else 0


def judge_apart(types: list[str]) -> Iterator[Verdict]:
    """Each type in a fork of this process, which has imported everything: a crash or an endless loop costs
    that type alone."""
    context = multiprocessing.get_context("fork")
    for model_type in types:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_judge, args=(model_type, sender))
        process.start()
        sender.close()
        try:
            yield (
                receiver.recv()
                if receiver.poll(TIMEOUT_S)
                else _crash(model_type, f"no end in {TIMEOUT_S} s")
            )
        except EOFError:
            process.join()
            yield _crash(model_type, f"the process ended with status {process.exitcode}")
        process.kill()
        process.join()


def cells(verdict: Verdict) -> tuple[str, ...]:
    """One row of a Markdown table: type, class, outcome, and the path or why there is none."""
    detail = verdict.path if verdict.outcome == "exact" else " ".join(verdict.reason.split())
    return verdict.model_type, verdict.model_class, verdict.outcome, detail


def _judge(model_type: str, sender: Connection) -> None:
    try:
        sender.send(judge(model_type))
    except Exception as error:
        logging.getLogger(__name__).error("%s", model_type, exc_info=error)
        sender.send(_crash(model_type, f"{type(error).__name__}: {error}"))


def _crash(model_type: str, reason: str) -> Verdict:
    return Verdict(model_type, "crash", reason=reason)


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("service.engine").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
