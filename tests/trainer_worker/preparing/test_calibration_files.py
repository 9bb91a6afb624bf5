"""A calibration file, as the worker reads it: grouped by user, or as one set."""

from __future__ import annotations

import json

import pytest

from tessera.chat.chat_format import ChatFormat
from tessera.errors import InvalidTrainingData
from tessera.methods.bases import CalibrationSet, Population
from trainer_worker.preparing.preparation import read_calibration, read_data


def content_of(*users: str | None) -> bytes:
    values = [
        {"prompt": "say", "completion": word, **({"user": user} if user else {})}
        for word, user in zip(("one", "two", "three", "four", "five"), users, strict=False)
    ]
    return "\n".join(json.dumps(value) for value in values).encode()


def test_the_lines_of_a_file_are_gathered_by_user(chat: ChatFormat) -> None:
    read = read_calibration(chat, content_of("ann", "bob", "ann", "bob", "ann"), max_tokens=64)
    ungrouped = read_calibration(chat, content_of(*[None] * 5), max_tokens=64)

    assert isinstance(read.examples, Population)
    assert read.examples.sizes == (3, 2)
    assert type(ungrouped.examples) is CalibrationSet
    one, two, three, four, five = ungrouped.examples.examples
    assert read.examples.examples == (one, three, five, two, four)
    assert read.examples.digest != ungrouped.examples.digest
    assert read.sha256 != ungrouped.sha256


def test_training_data_know_no_users(chat: ChatFormat) -> None:
    with pytest.raises(InvalidTrainingData, match='unknown key "user"'):
        read_data(chat, content_of("ann", "ann"), None, max_tokens=64)


def test_the_split_of_training_data_is_what_it_was(chat: ChatFormat) -> None:
    """The split goes by the hash of each example, so a new field of `Example` must not change it."""
    content = b"\n".join(b'{"text": "sentence number %d"}' % i for i in range(20))
    data = read_data(chat, content, None, max_tokens=64)

    held_back = [chat.tokenizer.decode(example.token_ids[1:]).split()[-1] for example in data.valid]
    assert sorted(held_back) == ["0<|end|>", "10<|end|>", "14<|end|>", "19<|end|>"]
