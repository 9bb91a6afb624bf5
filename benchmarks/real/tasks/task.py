"""A task of the benchmark: chat examples to train on, others to judge by. Knows no model.

Every maker takes a `random.Random`, so the same seed gives the same texts on every machine, and nothing is
downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: One line of a training file: {"messages": [{"role": …, "content": …}, …]}.
Example = dict[str, Any]
#: How the names of a task's files end.
TRAIN_SUFFIX, TEST_SUFFIX = ".train.jsonl", ".test.jsonl"
#: A question and its answer.
Pair = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """A data set and what is judged on it."""

    name: str
    train: tuple[Example, ...]
    #: Shares no question with `train`.
    test: tuple[Example, ...]
    #: exact: the greedy answer must equal the reference; loss: nats per token alone, because many answers
    #: would be good ones.
    judged: Literal["exact", "loss"] = "exact"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `NAME.train.jsonl` and `NAME.test.jsonl`, as a user would upload them."""
        paths = folder / (self.name + TRAIN_SUFFIX), folder / (self.name + TEST_SUFFIX)
        for path, examples in zip(paths, (self.train, self.test), strict=True):
            lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
            path.write_text("".join(lines), encoding="utf-8")
        return paths


def to_example(question: str, answer: str, *, system: str | None = None) -> Example:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def to_examples(pairs: Iterable[Pair], *, system: str | None = None) -> tuple[Example, ...]:
    return tuple(to_example(question, answer, system=system) for question, answer in pairs)


def draw(make: Callable[[], Pair], num: int, *, apart_from: Sequence[Pair] = ()) -> list[Pair]:
    """Return `num` pairs from repeated calls of `make`, no question twice and none of `apart_from`'s."""
    seen = {question for question, _ in apart_from}
    found: list[Pair] = []
    for _ in range(200 * num):
        if len(found) == num:
            return found
        pair = make()
        if pair[0] not in seen:
            seen.add(pair[0])
            found.append(pair)
    raise ValueError(
        f"only {len(found)} of {num} different questions were found: the word lists are too small"
    )


def balanced(labels: Sequence[str], num: int, rng: random.Random) -> list[str]:
    """Return `num` labels in random order, each as often as the others up to one."""
    chosen = [labels[i % len(labels)] for i in range(num)]
    rng.shuffle(chosen)
    return chosen
