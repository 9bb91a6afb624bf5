"""A message of a file may hold everything that a message of the chat endpoint may, with the same meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.http.schemas.fields import MESSAGE_IGNORED, MESSAGE_NEUTRAL
from service.http.schemas.generation import ChatMessage
from tessera.data.jsonl import Problems
from tessera.data.messages import read_message

PLAIN = {"role": "user", "content": "hello"}


def accepted_messages() -> Iterator[dict[str, Any]]:
    for role in ("system", "developer", "user", "assistant"):
        yield {**PLAIN, "role": role}
    parts = [
        {"type": "text", "text": "hel", "annotations": []},
        {"type": "text", "text": "lo", "cache_control": {"type": "x"}},
    ]
    yield {**PLAIN, "content": parts}
    yield {**PLAIN, "name": "ann"}
    yield {**PLAIN, "name": None, "nothing_known": None}
    for name in MESSAGE_IGNORED:
        for value in (None, [], [{"a": 1}], {"type": "ephemeral"}, "x"):
            yield {**PLAIN, name: value}
    for name, neutral in MESSAGE_NEUTRAL.items():
        for value in (None, *neutral.values):
            yield {**PLAIN, name: value}


@pytest.mark.parametrize("message", list(accepted_messages()), ids=str)
def test_a_file_takes_what_the_chat_endpoint_takes(message: dict[str, Any]) -> None:
    problems = Problems(10)
    read = read_message(message, problems, "messages[0]")
    assert problems.listed == []
    assert read == ChatMessage.model_validate(message).to_template()
