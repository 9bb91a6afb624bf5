"""The users of examples: named on every line of a file that builds a basis, or on none."""

from __future__ import annotations

import json

import pytest

from tessera.data.examples import parse_examples
from tessera.errors import InvalidTrainingData


def lines(*users: object) -> bytes:
    """Make a line for each user; None: a line without a user."""
    texts: list[dict[str, object]] = [{"text": f"example {i}"} for i in range(len(users))]
    for value, user in zip(texts, users, strict=True):
        if user is not None:
            value["user"] = user
    return "\n".join(json.dumps(value) for value in texts).encode()


def problems(content: bytes) -> list[tuple[int, str]]:
    with pytest.raises(InvalidTrainingData) as caught:
        parse_examples(content, with_users=True)
    return [(error.line, error.code) for error in caught.value.errors]


def test_users_are_read_in_every_format() -> None:
    content = b"""
        {"user": "ann", "messages": [{"role": "assistant", "content": "a"}]}
        {"prompt": "x", "completion": "y", "user": "bob"}
        {"text": "b", "user": "ann"}
        {"text": "c", "user": "bob"}"""

    examples = parse_examples(content, with_users=True)

    assert [(example.line, example.user) for example in examples] == [
        (2, "ann"), (3, "bob"), (4, "ann"), (5, "bob"),
    ]  # fmt: skip
    assert examples[1].completion == "y"
    assert [e.user for e in parse_examples(lines(None, None), with_users=True)] == [None, None]


def test_a_file_to_train_on_knows_no_users() -> None:
    with pytest.raises(InvalidTrainingData, match=r'line 1: unknown key "user"'):
        parse_examples(lines("ann", "ann"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lines("a", None, "a", None), [(2, "missing_user"), (4, "missing_user")]),
        (lines(None, "a", "a"), [(1, "missing_user")]),
        (lines("a", "b", "a"), [(2, "user_too_small")]),
        (lines("a", 7, "a"), [(2, "wrong_type")]),
        (lines("a", "", "a"), [(2, "invalid_user")]),
        (lines("a", "x" * 257, "a"), [(2, "invalid_user")]),
        (lines("a", "\ud800", "a"), [(2, "lone_surrogate")]),
        (
            lines("a", "a", "b") + b"\n{oops",
            [(4, "invalid_json")],
        ),  # the broken line may be a second example of b
        (lines("a", "a", None) + b"\n{oops", [(4, "invalid_json"), (3, "missing_user")]),
    ],
)
def test_what_is_wrong_with_users_is_told_by_line(content: bytes, expected: list[tuple[int, str]]) -> None:
    assert problems(content) == expected


def test_the_message_names_the_user_and_the_line() -> None:
    with pytest.raises(InvalidTrainingData) as caught:
        parse_examples(lines("ann", "bob", "ann"), with_users=True)
    assert 'line 2: user "bob" has only this example; give every user 2 or more' in caught.value.message
    with pytest.raises(InvalidTrainingData, match="line 2: the line has no user, but line 1 has one"):
        parse_examples(lines("ann", None, "ann"), with_users=True)
