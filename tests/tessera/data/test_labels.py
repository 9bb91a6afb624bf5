"""Files of labelled texts: what is read, and the line of everything that is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tessera.data.labels import (
    LabelledText,
    class_indices,
    class_names,
    is_labelled,
    parse_labelled,
    scores,
)
from tessera.errors import InvalidTrainingData


def lines(*values: Any) -> bytes:
    return "\n".join(json.dumps(value) for value in values).encode()


def problems(content: bytes) -> list[tuple[int, str]]:
    with pytest.raises(InvalidTrainingData) as error:
        parse_labelled(content)
    return [(problem.line, problem.code) for problem in error.value.errors]


def test_texts_and_pairs_under_the_names_of_glue() -> None:
    content = lines(
        {"text": "a", "label": "x"},
        {"sentence": "b", "label": "y", "idx": 7},
        {"text_a": "c", "text_b": "d", "label": "x"},
        {"sentence1": "e", "sentence2": "f", "label": "x"},
        {"premise": "g", "hypothesis": "h", "label": "x"},
        {"question1": "i", "question2": "j", "label": "x"},
        {"question": "k", "sentence": "l", "label": "x"},
        {"text": "m", "text_pair": "n", "label": "x", "comment": None},
    )
    assert [(e.text, e.text_pair) for e in parse_labelled(content)] == [
        ("a", None), ("b", None), ("c", "d"), ("e", "f"), ("g", "h"), ("i", "j"), ("k", "l"), ("m", "n"),
    ]  # fmt: skip
    assert parse_labelled(content)[1] == LabelledText("b", "y", None, 2)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ({"text": "a"}, "missing_label"),
        ({"text": "a", "label": None}, "missing_label"),
        ({"text": "a", "label": True}, "wrong_type"),
        ({"text": "a", "label": ["x"]}, "wrong_type"),
        ({"text": "a", "label": ""}, "invalid_label"),
        ({"text": "a", "label": "x" * 65}, "invalid_label"),
        ({"text": "", "label": "x"}, "empty_text"),
        ({"text": 3, "label": "x"}, "wrong_type"),
        ({"text": "a", "label": "x", "weight": 2}, "unknown_key"),
        ({"text_a": "a", "label": "x"}, "unknown_format"),
        ({"messages": [], "label": "x"}, "unknown_format"),
        ({"text": "a", "label": 1}, "mixed_labels"),
    ],
)
def test_every_problem_has_its_line(line: dict[str, Any], code: str) -> None:
    right = {"text": "a", "label": "x"}
    assert problems(lines(right, line, right, line)) == [(2, code), (4, code)]


def test_a_file_without_examples_is_refused() -> None:
    assert problems(b"\n\n") == [(1, "empty_file")]


def test_only_files_that_begin_with_a_label_are_labelled() -> None:
    assert is_labelled(lines({"text": "a", "label": 1}))
    assert is_labelled(b"\xef\xbb\xbf\n" + lines({"sentence1": "a", "sentence2": "b", "label": 1}))
    for other in (lines({"text": "a"}), lines({"messages": [], "label": 1}), b"", b"[1]", b"nonsense\n"):
        assert not is_labelled(other)


def test_classes_are_ordered_by_value_or_by_name() -> None:
    numbers = parse_labelled(lines(*({"text": "a", "label": label} for label in (10, 9, 10, 2))))
    assert class_names(numbers) == ["2", "9", "10"]
    names = parse_labelled(lines(*({"text": "a", "label": label} for label in ("b", "a", "b"))))
    assert class_names(names) == ["a", "b"]
    assert class_indices(names, ["a", "b"]) == [1, 0, 1]


def codes_of(action: Any) -> list[tuple[int, str]]:
    with pytest.raises(InvalidTrainingData) as error:
        action()
    return [(problem.line, problem.code) for problem in error.value.errors]


def test_labels_that_make_no_classes_have_their_lines() -> None:
    same = parse_labelled(lines({"text": "a", "label": "x"}, {"text": "b", "label": "x"}))
    assert codes_of(lambda: class_names(same)) == [(1, "one_class")]
    many = parse_labelled(lines(*({"text": "a", "label": label} for label in range(300))))
    assert codes_of(lambda: class_names(many)) == [(257, "too_many_labels")]
    long = [LabelledText("a", f"{index:03}" + "ü" * 60, line=index + 1) for index in range(200)]
    assert codes_of(lambda: class_names(long)) == [(1, "labels_too_long")]
    broken = parse_labelled(lines({"text": "a", "label": 1}, {"text": "b", "label": 1.5}))
    assert codes_of(lambda: class_names(broken)) == [(2, "not_a_class")]
    assert codes_of(lambda: class_indices(same, ["y"])) == [
        (1, "unknown_label"),
        (2, "unknown_label"),
    ]


def test_scores_are_numbers() -> None:
    assert scores(parse_labelled(lines({"text": "a", "label": 1}, {"text": "b", "label": 2.5}))) == [1, 2.5]
    names = parse_labelled(lines({"text": "a", "label": "x"}))
    assert codes_of(lambda: scores(names)) == [(1, "not_a_score")]
