"""The judged tasks by name, the users who are never judged, and tasks made of a file.

    for task in make_tasks(MAIN, seed=0): task.train, task.test

MAIN are the tasks that reports show one by one. ALL adds variants: other sets and languages of labels, 20 to
400 examples, wrong labels, tiny and long answers. Together they show how often a rule chooses well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from benchmarks.real.tasks.crowd import crowd
from benchmarks.real.tasks.extraction import dates_task, json_task, minutes_task, redaction_task, sql_task
from benchmarks.real.tasks.labels import COMMANDS, REVIEWS, TICKETS, approval_task, ticket_task
from benchmarks.real.tasks.personas import REPLIES, TELEGRAM, persona_task
from benchmarks.real.tasks.task import TEST_SUFFIX, TRAIN_SUFFIX, Example, Task

__all__ = ["ALL", "MAIN", "SIZES", "Task", "crowd", "make_tasks", "read_task"]

GERMAN = {
    "billing": "Rechnung", "delivery": "Lieferung", "returns": "Rückgabe",
    "account": "Konto", "technical": "Technik",
}  # fmt: skip
CODES = {"billing": "Q17", "delivery": "Q03", "returns": "Q44", "account": "Q28", "technical": "Q95"}
FRENCH = {"positive": "favorable", "negative": "défavorable", "mixed": "partagé"}
SPANISH_KEYS = {"product": "producto", "count": "cantidad", "city": "ciudad"}
_ROUTED = {kind: TICKETS[kind] for kind in REPLIES}

_MAKERS: Mapping[str, Callable[[str, random.Random], Task]] = {
    "tickets": ticket_task,
    "json": json_task,
    "persona": persona_task,
    "dates": dates_task,
    "routing": lambda name, rng: ticket_task(name, rng, kinds=_ROUTED, names=REPLIES, instruction=""),
    # The variants.
    "redaction": redaction_task,
    "sql": sql_task,
    "minutes": minutes_task,
    "approval": approval_task,
    "tickets-20": lambda name, rng: ticket_task(name, rng, num_train=20),
    "tickets-150": lambda name, rng: ticket_task(name, rng, num_train=150),
    "tickets-400": lambda name, rng: ticket_task(name, rng, num_train=400),
    "tickets-noisy": lambda name, rng: ticket_task(name, rng, noise=0.15),
    "tickets-german": lambda name, rng: ticket_task(name, rng, names=GERMAN, instruction=""),
    "tickets-codes": lambda name, rng: ticket_task(name, rng, names=CODES),
    "reviews": lambda name, rng: ticket_task(name, rng, kinds=REVIEWS, instruction=""),
    "reviews-20-french": lambda name, rng: ticket_task(
        name, rng, kinds=REVIEWS, names=FRENCH, num_train=20, instruction="Review: "
    ),
    "reviews-400-noisy": lambda name, rng: ticket_task(
        name, rng, kinds=REVIEWS, num_train=400, noise=0.1, instruction=""
    ),
    "commands-150": lambda name, rng: ticket_task(
        name, rng, kinds=COMMANDS, num_train=150, num_test=36, instruction="", unseen=1
    ),
    "json-20": lambda name, rng: json_task(name, rng, num_train=20),
    "json-150-spanish": lambda name, rng: json_task(name, rng, num_train=150, keys=SPANISH_KEYS),
    "contacts": lambda name, rng: json_task(name, rng, kind="contact", instruction="Extract the contact. "),
    "contacts-400": lambda name, rng: json_task(name, rng, kind="contact", num_train=400),
    "persona-20": lambda name, rng: persona_task(name, rng, wordings=1),
    "persona-150": lambda name, rng: persona_task(name, rng, num_answers=30, wordings=5),
    "telegram": lambda name, rng: persona_task(name, rng, style=TELEGRAM),
    "dates-20": lambda name, rng: dates_task(name, rng, num_train=20),
    "dates-400": lambda name, rng: dates_task(name, rng, num_train=400),
    "routing-20": lambda name, rng: ticket_task(
        name, rng, kinds=_ROUTED, names=REPLIES, num_train=20, instruction=""
    ),
    "redaction-150": lambda name, rng: redaction_task(name, rng, num_train=150),
}

MAIN = ("tickets", "json", "persona", "dates", "routing")
ALL = tuple(_MAKERS)
#: Of every kind and number of examples, for measuring the tables of learning rates.
SIZES = (
    "tickets-20", "json-20", "persona-20", *MAIN, "tickets-150", "json-150-spanish", "persona-150",
    "tickets-400", "contacts-400", "dates-400",
)  # fmt: skip


def make_tasks(names: Sequence[str] = MAIN, *, seed: int = 0) -> list[Task]:
    """Return the tasks of these names; another seed gives other texts of the kinds. Raises `KeyError`."""
    return [_MAKERS[name](name, random.Random(f"{name}/{seed}")) for name in names]


def read_task(
    path: Path,
    *,
    seed: int = 0,
    num_train: int = 60,
    num_test: int = 30,
    judged: Literal["exact", "loss"] = "loss",
) -> Task:
    """Return a task of a training file's examples; those of one question are on one side.

    `NAME.train.jsonl` beside `NAME.test.jsonl`, as `Task.write` writes them, are taken as they are. Raises
    `ValueError` if another file has too few different questions, `OSError` if there is no such file.
    """
    if path.name.endswith(TRAIN_SUFFIX):
        name = path.name.removesuffix(TRAIN_SUFFIX)
        return Task(name, _read(path), _read(path.with_name(name + TEST_SUFFIX)), judged)
    by_question: dict[str, Example] = {}
    for example in _read(path):
        by_question.setdefault(json.dumps(example["messages"][:-1]), example)
    examples = list(by_question.values())
    if len(examples) < num_train + num_test:
        raise ValueError(f"{path} has {len(examples)} different questions; {num_train + num_test} are needed")
    random.Random(f"{path.stem}/{seed}").shuffle(examples)
    train, test = examples[:num_train], examples[num_train : num_train + num_test]
    return Task(path.stem, tuple(train), tuple(test), judged)


def _read(path: Path) -> tuple[Example, ...]:
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
