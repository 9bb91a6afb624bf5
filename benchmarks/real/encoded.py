"""A task in tokens, split as the trainer worker splits a training file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.real.tasks import Task
from benchmarks.real.tasks.task import Example as Line
from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.data.examples import Example, parse_examples
from tessera.methods.bases import CalibrationSet, Population
from trainer_worker.data.training_data import TrainingData, encode_data

MAX_TOKENS = 512


@dataclass(frozen=True)
class EncodedTask:
    """What a job of the task trains on, and what it is judged by."""

    task: Task
    #: The training examples, some of them held back for validation.
    data: TrainingData
    #: One row per answer.
    test: tuple[EncodedExample, ...]

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def num_examples(self) -> int:
        """Those of the training file."""
        return len(self.task.train)

    def describe(self) -> dict[str, Any]:
        """Return what every record of the task says of it."""
        return {
            "task": self.name,
            "judged": self.task.judged,
            "num_examples": self.num_examples,
            "num_test": len(self.test),
        }

    @property
    def calibration(self) -> CalibrationSet:
        return CalibrationSet.from_encoded(self.data.train)


def encode_task(task: Task, chat: ChatFormat, *, max_tokens: int = MAX_TOKENS) -> EncodedTask:
    """Encode a task with the model's own chat template. Raises `InvalidTrainingData`."""
    data = encode_data(chat, _parsed(task.train), max_tokens=max_tokens)
    test = [row for line in _parsed(task.test) for row in chat.encode_rows(line, max_tokens=max_tokens)]
    return EncodedTask(task, data, tuple(test))


def encode_population(users: Sequence[Task], chat: ChatFormat, *, max_tokens: int = MAX_TOKENS) -> Population:
    """Encode the training examples of users from whom a basis is learned."""
    rows = [
        [row for line in _parsed(user.train) for row in chat.encode_rows(line, max_tokens=max_tokens)]
        for user in users
    ]
    return Population.of([CalibrationSet.from_encoded(user) for user in rows])


def _parsed(lines: Sequence[Line]) -> list[Example]:
    return parse_examples("\n".join(json.dumps(line) for line in lines).encode())
