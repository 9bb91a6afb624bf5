"""Labelled texts as training data: encoding, classes, and a validation split in which every class stays.

A row is one text or two, as `ChatFormat.labelled_ids` encodes them. Knows no model and no optimizer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.data.labels import LabelledText, class_indices, class_names, parse_labelled, scores
from tessera.data.statistics import count
from tessera.errors import InvalidTrainingData, LineError
from tessera.formats.head import REGRESSION
from trainer_worker.data.training_data import TrainingData, num_held_back


@dataclass(frozen=True)
class LabelledRow(EncodedExample):
    """One text with its class. None of its tokens is predicted."""

    #: The index of its class, or its standardised score.
    target: float = 0.0
    #: Of two texts for an encoder: the tokens before the second one; otherwise 0.
    first_length: int = 0


@dataclass(frozen=True)
class LabelledData:
    """The data of a classification job. All rows of `data` are `LabelledRow`s."""

    data: TrainingData
    #: The names of the classes, by index; empty for a regression.
    labels: tuple[str, ...]
    #: The scores of a regression are mean + scale · target.
    mean: float = 0.0
    scale: float = 1.0

    @property
    def num_scores(self) -> int:
        """Return the number of scores that a head for these data gives."""
        return len(self.labels) or 1


def read_labelled(
    chat: ChatFormat,
    training: bytes,
    validation: bytes | None,
    *,
    problem_type: str,
    max_tokens: int,
    share: float | None = None,
) -> LabelledData:
    """Parse and encode the files. Without a validation file, a `share` of the examples is held back.

    share: of the distinct texts; 0: none; None: decided by their number. Texts longer than `max_tokens` lose
    their end. Raises `InvalidTrainingData` with the lines of everything that is wrong: a single class, a
    label of the validation file that the training file lacks, scores that are all equal.
    """
    is_regression = problem_type == REGRESSION
    with _about("training_file"):
        examples = parse_labelled(training)
        labels = () if is_regression else tuple(class_names(examples))
        values = _values(examples, labels)
        mean, scale = _standard(examples, values) if is_regression else (0.0, 1.0)
    held_out: list[tuple[LabelledText, float]] | None = None
    if validation is not None:
        with _about("validation_file"):
            parsed = parse_labelled(validation)
            held_out = list(zip(parsed, _values(parsed, labels), strict=True))
    digests = [_digest(example) for example in examples]
    if held_out is None:
        chosen = _validation_digests(digests, None if is_regression else values, share)
        overlap = 0
    else:
        chosen = set()
        overlap = len(set(digests) & {_digest(example) for example, _ in held_out})

    def rows(items: Sequence[tuple[LabelledText, float]]) -> tuple[LabelledRow, ...]:
        return tuple(_row(chat, item, (value - mean) / scale, max_tokens) for item, value in items)

    pairs = list(zip(examples, values, strict=True))
    train = rows([pair for pair, digest in zip(pairs, digests, strict=True) if digest not in chosen])
    if held_out is None:
        held_out = [pair for pair, digest in zip(pairs, digests, strict=True) if digest in chosen]
    valid = rows(held_out)
    data = TrainingData(
        train,
        valid,
        digest=_data_digest(train, valid, labels),
        num_truncated=sum(row.truncated for row in (*train, *valid)),
        num_overlapping=overlap,
        max_tokens=max_tokens,
        statistics=count((f"{e.text}\n{e.text_pair or ''}", e.name) for e in examples),
    )
    return LabelledData(data, labels, mean, scale)


@contextmanager
def _about(param: str) -> Iterator[None]:
    """Let the errors in a file name the field of the job that names the file."""
    try:
        yield
    except InvalidTrainingData as error:
        raise InvalidTrainingData(
            error.errors, param=param, code=error.code, num_problems=error.num_problems
        ) from error


def _values(examples: Sequence[LabelledText], labels: Sequence[str]) -> list[float]:
    """Return the class or the score of each example."""
    return [float(index) for index in class_indices(examples, labels)] if labels else scores(examples)


def _standard(examples: Sequence[LabelledText], values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation of the scores. Raises `InvalidTrainingData` if all are equal."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    if not deviation > 0 or not math.isfinite(deviation):
        message = f"all lines have the score {values[0]:g}; a regression needs different scores"
        raise InvalidTrainingData([LineError(examples[0].line, "one_score", message)])
    return mean, deviation


def _row(chat: ChatFormat, example: LabelledText, target: float, max_tokens: int) -> LabelledRow:
    found = chat.labelled_ids(example.text, example.text_pair, max_tokens=max_tokens)
    return LabelledRow(
        found.token_ids,
        [False] * len(found.token_ids),
        truncated=found.is_truncated,
        target=target,
        first_length=found.first_length,
    )


def _validation_digests(
    digests: Sequence[str], classes: Sequence[float] | None, share: float | None
) -> set[str]:
    """Choose the texts to hold back, by their hashes, so that the same file gives the same split.

    classes: the class of each text; one text of every class stays in training. None for a regression.
    """
    classes_of: dict[str, set[float]] = {}
    for digest, label in zip(digests, classes or (0.0,) * len(digests), strict=True):
        classes_of.setdefault(digest, set()).add(label)
    left = Counter(chain.from_iterable(classes_of.values()))
    chosen: set[str] = set()
    for digest in sorted(classes_of):
        if len(chosen) == num_held_back(len(classes_of), share):
            break
        if all(left[label] > 1 for label in classes_of[digest]):
            left.subtract(classes_of[digest])
            chosen.add(digest)
    return chosen


def _digest(example: LabelledText) -> str:
    """The same for equal texts, whatever their labels, so that they stay on one side."""
    return hashlib.sha256(json.dumps([example.text, example.text_pair]).encode()).hexdigest()


def _data_digest(train: Sequence[LabelledRow], valid: Sequence[LabelledRow], labels: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(labels)).encode())
    for part in (train, valid):
        for row in part:
            digest.update(json.dumps([row.token_ids, row.target, row.first_length]).encode())
        digest.update(b"\0")
    return digest.hexdigest()
