"""Reading files of preference pairs: a prompt with an answer that was preferred and one that was not.

A line is in OpenAI's form or in one of TRL's, which a file may mix:

    {"input": {"messages": […]}, "preferred_output": [{"role": "assistant", …}], "non_preferred_output": […]}
    {"prompt": […], "chosen": [{"role": "assistant", "content": "…"}], "rejected": […]}
    {"prompt": "…", "chosen": "…", "rejected": "…"}
    {"chosen": […], "rejected": […]}         the messages that both begin with are the prompt
    {"chosen": "…", "rejected": "…"}         the words that both begin with are the prompt

A key with the value null counts as absent. A pair that `parse_pairs` accepts has two different answers that
are not empty. This module knows no tokenizer and no template; `ChatFormat.check` does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tessera.data.examples import MAX_EXAMPLES, MAX_LINE_BYTES, MAX_LISTED_ERRORS, Example
from tessera.data.jsonl import Problems, kind, read_objects, shown
from tessera.data.messages import check_keys, check_learned, read_messages, read_text
from tessera.errors import InvalidTrainingData

FORMATS = (
    '{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]} or '
    '{"prompt": …, "chosen": …, "rejected": …}'
)
#: Keys that only lines of this kind have.
_OPENAI, _TRL = ("preferred_output", "non_preferred_output"), ("chosen", "rejected")
#: Lines that are read to find out what a file holds, until one is an object.
_MAX_PROBED_LINES = 100


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. Each is an example of which only the answer is learned."""

    chosen: Example
    rejected: Example
    prompt: str = ""  # what comes before both answers, as a key by which pairs with one prompt are found
    line: int = 0  # number of its line in the file, counted from 1


def holds_pairs(content: bytes) -> bool:
    """Return whether the first readable line of a file is a preference pair."""
    lines = read_objects(content, Problems(1), max_line_bytes=MAX_LINE_BYTES, max_lines=_MAX_PROBED_LINES)
    try:
        first = next((value for value in lines if value is not None), {})
    except InvalidTrainingData:
        return False
    return any(key in first for key in (*_OPENAI, *_TRL))


def parse_pairs(
    content: bytes,
    *,
    max_errors: int = MAX_LISTED_ERRORS,
    max_line_bytes: int = MAX_LINE_BYTES,
    max_pairs: int = MAX_EXAMPLES,
) -> list[Pair]:
    """Read the pairs of a JSONL file, in order. Blank lines, a UTF-8 byte order mark and CRLF are allowed.

    Raises `InvalidTrainingData` with the problems of all lines, as `parse_examples` does. Two lines with the
    same prompt and the same answers the other way round are a problem of the later one.
    """
    problems = Problems(max_errors)
    pairs: list[Pair] = []
    orders: dict[tuple[str, str], int] = {}  # the digests of both answers → the first line with them
    for value in read_objects(content, problems, max_line_bytes=max_line_bytes, max_lines=max_pairs):
        if value is None:
            continue
        pair = _pair({key: item for key, item in value.items() if item is not None}, problems)
        if pair is not None:
            _check_order(pair, orders, problems)
            pairs.append(pair)
    problems.raise_if_any()
    if not pairs:
        problems.line = 1
        problems.add("empty_file", "the file has no pair; write one JSON object per line")
        problems.raise_if_any(code="empty_file")
    return pairs


def _pair(value: dict[str, Any], problems: Problems) -> Pair | None:
    """Make the pair of one line, and add what is wrong with it to `problems`; None if anything is."""
    before = problems.total
    if any(key in value for key in _OPENAI):
        pair = _of_openai(value, problems)
    elif any(key in value for key in _TRL):
        pair = _of_trl(value, problems)
    else:
        given = ", ".join(shown(key) for key in list(value)[:5]) or "none"
        message = f"the file holds pairs, so this line must be {FORMATS} too; its keys: {given}"
        problems.add("not_a_pair", message)
        return None
    return pair if problems.total == before else None


def _of_openai(value: dict[str, Any], problems: Problems) -> Pair | None:
    check_keys(value, ("input", *_OPENAI), problems)
    context = None
    if "input" not in value:
        problems.add("missing_key", "input is missing")
    elif not isinstance(value["input"], dict):
        problems.add("wrong_type", f"input must be an object with messages, not {kind(value['input'])}")
    else:
        prompt = {key: item for key, item in value["input"].items() if item is not None}
        check_keys(prompt, ("messages",), problems, where="input.")
        if "messages" in prompt:
            context = read_messages(prompt["messages"], "input.messages", problems, is_context=True)
        else:
            problems.add("missing_key", "input.messages is missing")
    return _answered(context, value, _OPENAI, problems)


def _of_trl(value: dict[str, Any], problems: Problems) -> Pair | None:
    check_keys(value, ("prompt", *_TRL), problems, knows_tools=True)
    kinds = {type(value[key]) for key in _TRL if key in value}
    if not all(key in value for key in _TRL) or not (kinds == {str} or kinds == {list}):
        for key in _TRL:
            if key not in value:
                problems.add("missing_key", f"{key} is missing")
            elif type(value[key]) not in (str, list):
                message = f"{key} must be a text or a list of messages, not {kind(value[key])}"
                problems.add("wrong_type", message)
        if kinds == {str, list}:
            problems.add("wrong_type", "chosen and rejected must both be texts, or both lists of messages")
        return None
    if kinds == {str}:
        return _texts(value, problems)
    if isinstance(value.get("prompt"), list):
        context = read_messages(value["prompt"], "prompt", problems, is_context=True)
        return _answered(context, value, _TRL, problems)
    return _implicit(value, problems)


def _answered(
    context: tuple[dict[str, Any], ...] | None,
    value: dict[str, Any],
    keys: tuple[str, str],
    problems: Problems,
) -> Pair | None:
    """Make the pair of a prompt and the answers at `keys`, which are lists of messages."""
    answers = []
    for key in keys:
        if key not in value:
            problems.add("missing_key", f"{key} is missing")
            continue
        answer = read_messages(value[key], key, problems)
        if answer is not None:
            check_learned(answer, key, problems)
            answers.append(answer)
    if context is None or len(answers) < 2:
        return None
    return _messages_pair(context, answers[0], answers[1], keys, problems)


def _implicit(value: dict[str, Any], problems: Problems) -> Pair | None:
    """Make the pair of two conversations. The messages that both begin with are the prompt."""
    one, other = (read_messages(value[key], key, problems) for key in _TRL)
    if one is None or other is None:
        return None
    length = _num_common([_text(message) for message in one], [_text(message) for message in other])
    context, chosen, rejected = one[:length], one[length:], other[length:]
    prompt = value.get("prompt")
    if prompt is not None and (not context or prompt != context[-1]["content"]):
        message = (
            "chosen and rejected are lists of messages, so prompt must be one too; a text is allowed where "
            "it repeats the last message that both begin with"
        )
        problems.add("wrong_type", message)
        return None
    if not chosen and not rejected:
        problems.add("identical_answers", _IDENTICAL.format(*_TRL))
        return None
    for key, answer, longer in (("chosen", chosen, "rejected"), ("rejected", rejected, "chosen")):
        if not answer:
            problems.add("empty_answer", f"{key} ends where {longer} goes on, so it has no answer")
        elif answer[0]["role"] != "assistant":
            message = (
                f"{key}[{length}] has the role {answer[0]['role']}, but there the two must differ by an "
                "answer of the assistant: give both the same prompt"
            )
            problems.add("different_prompts", message)
        else:
            check_learned(answer, key, problems)
    return _messages_pair(context, chosen, rejected, _TRL, problems)


def _messages_pair(
    context: Sequence[dict[str, Any]],
    chosen: Sequence[dict[str, Any]],
    rejected: Sequence[dict[str, Any]],
    keys: tuple[str, str],
    problems: Problems,
) -> Pair:
    if [_text(message) for message in chosen] == [_text(message) for message in rejected]:
        problems.add("identical_answers", _IDENTICAL.format(*keys))
    prompt = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in context]
    line = problems.line
    return Pair(
        Example(messages=(*prompt, *chosen), line=line),
        Example(messages=(*prompt, *rejected), line=line),
        prompt=json.dumps(prompt, sort_keys=True),
        line=line,
    )


def _texts(value: dict[str, Any], problems: Problems) -> Pair | None:
    """Make the pair of two texts, after a prompt or with one that both begin with."""
    answers = [read_text(value, key, problems) for key in _TRL]
    prompt = read_text(value, "prompt", problems) if "prompt" in value else None
    if None in answers or (prompt is None and "prompt" in value):
        return None
    chosen, rejected = (answer or "" for answer in answers)
    if chosen == rejected:
        problems.add("identical_answers", _IDENTICAL.format(*_TRL))
        return None
    if prompt is None:
        prompt = _common_words(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for key, answer in zip(_TRL, (chosen, rejected), strict=True):
        if not answer.strip():
            problems.add("empty_answer", f"{key} has no text after the prompt; give the answer")
    line = problems.line
    return Pair(
        Example(prompt=prompt, completion=chosen, line=line),
        Example(prompt=prompt, completion=rejected, line=line),
        prompt=json.dumps(prompt),
        line=line,
    )


def _common_words(one: str, other: str) -> str:
    """Return the whole words that both texts begin with, without the space after the last one.

    TRL also splits within a word that both begin with, which no generated text would continue.
    """
    length = _num_common(one, other)
    while length and not (one[length : length + 1].isspace() and other[length : length + 1].isspace()):
        length -= 1
    return one[:length]


def _num_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many elements both sequences begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (mine, its) in pairs if mine != its), min(len(one), len(other)))


def _text(message: dict[str, Any]) -> tuple[Any, ...]:
    return message["role"], message["content"], message.get("name")


def _check_order(pair: Pair, orders: dict[tuple[str, str], int], problems: Problems) -> None:
    """Report a pair that an earlier line has the other way round: the two would cancel each other."""
    chosen, rejected = (_key(example) for example in (pair.chosen, pair.rejected))
    orders.setdefault((chosen, rejected), pair.line)
    earlier = orders.get((rejected, chosen))
    if earlier is not None:
        message = f"line {earlier} prefers the answer that this line rejects, for the same prompt; remove one"
        problems.add("contradicting_pairs", message)


def _key(example: Example) -> str:
    fields = {name: value for name, value in asdict(example).items() if name != "line"}
    return json.dumps(fields, sort_keys=True)


_IDENTICAL = "{} and {} are the same answer; there is nothing to prefer, so remove the line"
