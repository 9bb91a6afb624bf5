"""Reading the examples of a classification: texts or pairs of texts, each with a label or a score.

A line is a JSON object with one text or two, under the names of the tool or the GLUE task that it comes from,
and its label:

    {"text": "…", "label": "billing"}           or sentence
    {"text_a": "…", "text_b": "…", "label": 1}  or sentence1 and sentence2, premise and hypothesis,
                                                question1 and question2, question and sentence, text and
                                                text_pair

A label is a string or a whole number, a score any number. Whether the labels of a file are classes or scores
is said by the job that trains on it. A key with the value null counts as absent, and GLUE's `idx` is ignored.
Needs neither torch nor a tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.data.examples import MAX_EXAMPLES, MAX_LINE_BYTES, MAX_LISTED_ERRORS
from tessera.data.jsonl import Problems, kind, read_objects, shown
from tessera.defaults import MAX_LABEL_CHARS, MAX_LABELS, MAX_LABELS_BYTES
from tessera.errors import InvalidTrainingData

#: The keys of one text, and of two.
SINGLE_KEYS = ("text", "sentence")
PAIR_KEYS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
LABEL_KEY = "label"
_TEXT_KEYS = frozenset((*SINGLE_KEYS, *(key for pair in PAIR_KEYS for key in pair)))
_IGNORED = frozenset(("idx",))
_FORMATS = '{"text": "…", "label": …} or {"text_a": "…", "text_b": "…", "label": …}'


@dataclass(frozen=True)
class LabelledText:
    """One text or pair of texts, and its label as the file gives it."""

    text: str
    label: str | int | float
    text_pair: str | None = None
    line: int = 0  # number of its line in the file, counted from 1

    @property
    def name(self) -> str:
        """The label as the name of a class."""
        return str(self.label)


def is_labelled(content: bytes) -> bool:
    """Return whether the first object of a file has a label and a text of its own.

    A file for which this is wrong is read as conversations, prompts or texts (`examples.py`).
    """
    problems = Problems(1)
    try:
        for value in read_objects(content, problems, max_line_bytes=MAX_LINE_BYTES, max_lines=1):
            if value is None:
                return False
            return LABEL_KEY in value and bool(_TEXT_KEYS & value.keys()) and "messages" not in value
    except InvalidTrainingData:
        return False
    return False


def parse_labelled(
    content: bytes, *, max_errors: int = MAX_LISTED_ERRORS, max_examples: int = MAX_EXAMPLES
) -> list[LabelledText]:
    """Read the labelled texts of a JSONL file, in order.

    Raises `InvalidTrainingData` with the problems of all lines: unknown keys, missing or empty texts, labels
    of another kind than those of the lines before.
    """
    problems = Problems(max_errors)
    examples = []
    for value in read_objects(content, problems, max_line_bytes=MAX_LINE_BYTES, max_lines=max_examples):
        if value is not None:
            example = _example({key: item for key, item in value.items() if item is not None}, problems)
            if example is not None:
                examples.append(example)
    _check_kinds(examples, problems)
    problems.raise_if_any()
    if not examples:
        problems.line = 1
        problems.add("empty_file", "the file has no example; write one JSON object per line")
        problems.raise_if_any(code="empty_file")
    return examples


def class_names(examples: Sequence[LabelledText]) -> list[str]:
    """Return the labels of a training file as names of classes, in the order of the classes.

    Whole numbers are ordered by value, names by their characters. Raises `InvalidTrainingData` for scores,
    for a single class, and for more than MAX_LABELS.
    """
    problems = Problems(MAX_LISTED_ERRORS)
    labels: dict[str | int | float, int] = {}
    for example in examples:
        labels.setdefault(example.label, example.line)
        if isinstance(example.label, float):
            problems.line = example.line
            message = (
                f"label {example.label} is no class; write a name or a whole number, "
                'or train with "problem_type": "regression"'
            )
            problems.add("not_a_class", message)
    problems.raise_if_any()
    if len(labels) < 2:
        problems.line = examples[0].line
        message = f"all lines have the label {shown(examples[0].name)}; a classifier needs two or more labels"
        problems.add("one_class", message)
    elif len(labels) > MAX_LABELS:
        problems.line = list(labels.values())[MAX_LABELS]
        problems.add("too_many_labels", f"the file has {len(labels)} labels; the limit is {MAX_LABELS}")
    names = [str(label) for label in sorted(labels)]  # type: ignore[type-var]
    if len(json.dumps(names)) > MAX_LABELS_BYTES:
        problems.line = examples[0].line
        problems.add("labels_too_long", f"all labels together have more than {MAX_LABELS_BYTES} bytes")
    problems.raise_if_any()
    return names


def class_indices(examples: Sequence[LabelledText], names: Sequence[str]) -> list[int]:
    """Return the class of each example. Raises `InvalidTrainingData` with the lines of unknown labels."""
    index_of = {name: index for index, name in enumerate(names)}
    problems = Problems(MAX_LISTED_ERRORS)
    indices = []
    for example in examples:
        if example.name in index_of:
            indices.append(index_of[example.name])
        else:
            problems.line = example.line
            message = f"the label {shown(example.name)} does not occur in the training file"
            problems.add("unknown_label", message)
    problems.raise_if_any()
    return indices


def scores(examples: Sequence[LabelledText]) -> list[float]:
    """Return the score of each example. Raises `InvalidTrainingData` with the lines of names."""
    problems = Problems(MAX_LISTED_ERRORS)
    found = []
    for example in examples:
        if isinstance(example.label, str):
            problems.line = example.line
            message = f"the label {shown(example.label)} is a name; a regression needs numbers"
            problems.add("not_a_score", message)
        else:
            found.append(float(example.label))
    problems.raise_if_any()
    return found


def _example(value: dict[str, Any], problems: Problems) -> LabelledText | None:
    """Make the example of one line, or add what is wrong with it to `problems`."""
    before = problems.total
    pair = next((keys for keys in PAIR_KEYS if set(keys) <= value.keys()), None)
    single = next((key for key in SINGLE_KEYS if key in value), None)
    keys: tuple[str, ...] = pair or ((single,) if single else ())
    if not keys:
        given = ", ".join(shown(key) for key in list(value)[:5]) or "none"
        problems.add("unknown_format", f"a line must be {_FORMATS}; the keys of this one: {given}")
        return None
    for key in value:
        if key not in (*keys, LABEL_KEY) and key not in _IGNORED:
            known = ", ".join((*keys, LABEL_KEY))
            problems.add("unknown_key", f"unknown key {shown(key)}; remove it (known here: {known})")
    for key in keys:
        text = value[key]
        if not isinstance(text, str):
            problems.add("wrong_type", f"{key} must be a string, not {kind(text)}")
        elif not text.strip():
            problems.add("empty_text", f"{key} is empty; give the text to be classified, or remove the line")
    label = _label(value, problems)
    if problems.total > before or label is None:
        return None
    return LabelledText(value[keys[0]], label, value[keys[1]] if pair else None, problems.line)


def _label(value: dict[str, Any], problems: Problems) -> str | int | float | None:
    """Return the label of a line; None if it is missing or cannot be one."""
    label = value.get(LABEL_KEY)
    if label is None:
        problems.add("missing_label", "the line has no label; give the text its class or its score")
    elif isinstance(label, bool) or not isinstance(label, str | int | float):
        problems.add("wrong_type", f"label must be a string or a number, not {kind(label)}")
        return None
    elif isinstance(label, float) and not math.isfinite(label):
        problems.add("wrong_type", "label must be a finite number")
        return None
    elif not 0 < len(str(label)) <= MAX_LABEL_CHARS:
        message = f"a label has 1 to {MAX_LABEL_CHARS} characters, not {len(str(label))}"
        problems.add("invalid_label", message)
        return None
    return label


def _check_kinds(examples: Sequence[LabelledText], problems: Problems) -> None:
    """Report the labels that are numbers where the first is a name, or the reverse."""
    if not examples:
        return
    first = examples[0]
    for example in examples:
        if isinstance(example.label, str) != isinstance(first.label, str):
            own, other = ("a name", "a number") if isinstance(example.label, str) else ("a number", "a name")
            problems.line = example.line
            message = f"this label is {own}, and that of line {first.line} {other}; write all in one way"
            problems.add("mixed_labels", message)
