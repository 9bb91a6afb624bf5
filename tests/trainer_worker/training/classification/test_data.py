"""Labelled files as training data: the split, the classes, the standardised scores."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tessera.chat.chat_format import ChatFormat
from tessera.errors import InvalidTrainingData
from tessera.formats.head import CLASSIFICATION, REGRESSION
from trainer_worker.data.training_data import num_held_back
from trainer_worker.training.classification.data import LabelledData, LabelledRow, read_labelled


def content(labels: list[Any], *, text: str = "text number") -> bytes:
    rows = ({"text": f"{text} {index}", "label": label} for index, label in enumerate(labels))
    return "\n".join(map(json.dumps, rows)).encode()


def read(
    chat: ChatFormat, training: bytes, validation: bytes | None = None, *, problem_type: str = CLASSIFICATION,
    max_tokens: int = 100,
) -> LabelledData:  # fmt: skip
    return read_labelled(chat, training, validation, problem_type=problem_type, max_tokens=max_tokens)


def targets(rows: Any) -> list[float]:
    assert all(isinstance(row, LabelledRow) for row in rows)
    return [row.target for row in rows]


def test_the_split_repeats_and_keeps_every_class_in_training(chat: ChatFormat) -> None:
    labels = ["common"] * 58 + ["rare", "unique"]
    first, second = (read(chat, content(labels)) for _ in range(2))
    assert first == second
    assert first.labels == ("common", "rare", "unique")
    num_valid = num_held_back(60, None)
    assert (first.data.num_train, first.data.num_valid) == (60 - num_valid, num_valid)
    assert Counter(targets(first.data.train)) == {0.0: 58 - num_valid, 1.0: 1, 2.0: 1}


def test_a_job_may_choose_the_share_that_is_held_back(chat: ChatFormat) -> None:
    training = content(["a", "b"] * 20)
    for share, num_valid in ((0, 0), (0.25, 10), (None, num_held_back(40, None))):
        data = read_labelled(
            chat, training, None, problem_type=CLASSIFICATION, max_tokens=100, share=share
        ).data
        assert data.num_valid == num_valid


def test_equal_texts_stay_on_one_side(chat: ChatFormat) -> None:
    twice = content(["a", "b"] * 20) + b"\n" + content(["b", "a"] * 20)
    data = read(chat, twice).data
    train, valid = ({tuple(row.token_ids) for row in rows} for rows in (data.train, data.valid))
    assert valid
    assert not train & valid


def test_a_validation_file_uses_the_classes_of_the_training_file(chat: ChatFormat) -> None:
    training = content(["b", "a", "c"])
    data = read(chat, training, content(["c", "c"]))
    assert targets(data.data.valid) == [2.0, 2.0]
    assert data.data.num_overlapping == 2
    with pytest.raises(InvalidTrainingData) as error:
        read(chat, training, content(["c", "x", "y"]))
    assert [(e.line, e.code) for e in error.value.errors] == [(2, "unknown_label"), (3, "unknown_label")]
    assert error.value.param == "validation_file"


def test_one_class_cannot_be_learned(chat: ChatFormat) -> None:
    with pytest.raises(InvalidTrainingData, match="line 1: all lines have the label") as error:
        read(chat, content(["x"] * 5))
    assert error.value.param == "training_file"


def test_scores_are_standardised(chat: ChatFormat) -> None:
    data = read(chat, content([1, 2, 3, 4, 5.0]), content([3]), problem_type=REGRESSION)
    assert (data.labels, data.num_scores, data.mean) == ((), 1, 3.0)
    assert data.scale == pytest.approx(2**0.5)
    assert sum(targets(data.data.train)) == pytest.approx(0)
    assert targets(data.data.valid) == [0.0]
    with pytest.raises(InvalidTrainingData, match="different scores"):
        read(chat, content([1, 1, 1]), problem_type=REGRESSION)


def test_long_texts_lose_their_end(chat: ChatFormat) -> None:
    long = content(["a", "b"], text="one two three four five six seven eight nine ten")
    data = read(chat, long, max_tokens=4).data
    assert data.num_truncated == 2
    assert {len(row.token_ids) for row in data.train} == {4}
    assert data.train[0].token_ids == chat.text_ids("one two three four five")[:4]
    assert data.num_train_tokens == 8


def test_a_pair_is_one_text_with_a_line_break(chat: ChatFormat) -> None:
    pair = b'{"text_a": "one", "text_b": "two", "label": 1}\n{"text_a": "two", "text_b": "one", "label": 0}'
    data = read(chat, pair).data
    assert data.train[0].token_ids == chat.text_ids("one\ntwo")
