"""Training files: JSON lines to examples, with every problem of the file at once.

Three kinds of line, which a file may mix:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…", "weight": 1}]}
    {"prompt": "…", "completion": "…"}
    {"text": "…"}

In a file that builds a basis, every line may also say in `user` whose example it is, or none.

Knows no tokenizer and no template: what is checked here needs neither, so an upload is judged before any
model is asked. A line that `parse_examples` lets through has at least one character to train on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapter_core.jsonl import Problems, kind, read_objects, shown

ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "weight")
FORMATS = '{"messages": […]}, {"prompt": "…", "completion": "…"} or {"text": "…"}'

#: 1 MiB is about 200,000 words: no example of that length fits a context, but a file that is no JSONL shows.
MAX_LINE_BYTES = 1024 * 1024
#: An adapter of 57,000 numbers holds some thousands of examples at the most.
MAX_EXAMPLES = 50_000
#: Of a user's name: an id or an address, no text.
MAX_USER_CHARS = 256
#: A user's examples are divided into some to learn from and some to measure with.
MIN_USER_EXAMPLES = 2


@dataclass(frozen=True)
class Example:
    """One training item: a conversation, a prompt with its completion, or a text; the others are None.

    user: whose it is, if the file says so. line: where it stands in its file, 1-based.
    """

    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    user: str | None = None
    line: int = 0


def parse_examples(
    content: bytes,
    *,
    max_errors: int = 100,
    max_line_bytes: int = MAX_LINE_BYTES,
    max_examples: int = MAX_EXAMPLES,
    with_users: bool = False,
) -> list[Example]:
    """The examples of a JSONL file, in order. Blank lines, a UTF-8 byte order mark and CRLF are let pass.

    with_users: lines may say whose they are; else that is a key like any unknown one.

    Raises `InvalidTrainingData` with the problems of all lines; beyond `max_errors` they are only counted, in
    one last entry with code "more_errors". A file without any example has the error code "empty_file".
    """
    problems = Problems(max_errors)
    examples: list[Example] = []
    for value in read_objects(content, problems, max_line_bytes=max_line_bytes, max_lines=max_examples):
        if value is not None:
            user = _user(value, problems) if with_users else None
            examples.append(replace(_example(value, problems), user=user))
    _check_users(examples, problems)
    problems.raise_if_any()
    if not examples:
        problems.line = 1
        problems.add("empty_file", "the file holds no example; write one JSON object per line")
        problems.raise_if_any(code="empty_file")
    return examples


def _example(value: dict[str, Any], problems: Problems) -> Example:
    """The example of one line; whatever is wrong with it is added to `problems`."""
    line = problems.line
    if "messages" in value:
        _check_keys(value, ("messages",), problems)
        return Example(messages=_messages(value["messages"], problems), line=line)
    if "prompt" in value or "completion" in value:
        _check_keys(value, ("prompt", "completion"), problems)
        prompt = _text(value, "prompt", problems)
        completion = _text(value, "completion", problems)
        if completion is not None and not completion.strip():
            problems.add("empty_completion", "completion is empty; give the text to be learned")
        return Example(prompt=prompt, completion=completion, line=line)
    if "text" in value:
        _check_keys(value, ("text",), problems)
        text = _text(value, "text", problems)
        if text is not None and not text.strip():
            problems.add("empty_text", "text is empty; give the text to be learned, or remove the line")
        return Example(text=text, line=line)
    keys = ", ".join(shown(key) for key in list(value)[:5]) or "none"
    problems.add("unknown_format", f"a line must be {FORMATS}; the keys of this one: {keys}")
    return Example(line=line)


def _user(value: dict[str, Any], problems: Problems) -> str | None:
    """Whose example it is, taken out of the line; None if it does not say, "" if that cannot be read."""
    if "user" not in value:
        return None
    user = _text(value, "user", problems)
    del value["user"]
    if user is not None and not 0 < len(user) <= MAX_USER_CHARS:
        problems.add("invalid_user", f"user must have 1 to {MAX_USER_CHARS} characters, not {len(user)}")
        return ""
    return user or ""


def _check_users(examples: Sequence[Example], problems: Problems) -> None:
    """Adds lines without a user where others have one, and the users of too few examples.

    Those are not counted in a file with other mistakes: some of their lines may be among them.
    """
    first = next((example for example in examples if example.user is not None), None)
    if first is None:
        return
    is_whole = not problems.total
    counts = Counter(example.user for example in examples)
    for example in examples:
        problems.line = example.line
        if example.user is None:
            hint = f"line {first.line} has one; give every line a user, or none"
            problems.add("missing_user", f"the line says no user, but {hint}")
        elif is_whole and counts[example.user] < MIN_USER_EXAMPLES:
            message = f"user {shown(example.user)} has only this example; give every user {MIN_USER_EXAMPLES}"
            problems.add("user_too_small", f"{message} or more")


def _check_keys(value: dict[str, Any], known: tuple[str, ...], problems: Problems, where: str = "") -> None:
    for key in value:
        if key not in known:
            hint = f"known here: {', '.join(known)}"
            problems.add("unknown_key", f"{where}unknown key {shown(key)}; remove it ({hint})")


def _text(value: dict[str, Any], key: str, problems: Problems, where: str = "") -> str | None:
    """The string at `key`; None, with the problem added, if there is none that can be encoded."""
    if key not in value:
        problems.add("missing_key", f"{where}{key} is missing")
        return None
    text = value[key]
    if not isinstance(text, str):
        hint = "; lists of content parts are not supported" if isinstance(text, list) else ""
        problems.add("wrong_type", f"{where}{key} must be a string, not {kind(text)}{hint}")
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        problems.add("lone_surrogate", f"{where}{key} holds half of a surrogate pair; remove it")
        return None
    return text


def _messages(value: Any, problems: Problems) -> tuple[dict[str, Any], ...] | None:
    if not isinstance(value, list):
        problems.add("wrong_type", f"messages must be a list, not {kind(value)}")
        return None
    if not value:
        problems.add("empty_messages", "messages is empty; give at least one assistant message")
        return None
    before = problems.total
    messages = [_message(item, problems, f"messages[{index}]") for index, item in enumerate(value)]
    if problems.total > before:
        return None
    assistant = [message for message in messages if message["role"] == "assistant"]
    if not assistant:
        problems.add("no_assistant_message", "no message has the role assistant: there is nothing to learn")
    elif not any(message.get("weight", 1) for message in assistant):
        problems.add("nothing_trained", "all assistant messages have weight 0: there is nothing to learn")
    return tuple(messages)


def _message(item: Any, problems: Problems, where: str) -> dict[str, Any]:
    """role, content and, if given, weight of one message."""
    if not isinstance(item, dict):
        problems.add("wrong_type", f"{where} must be an object with role and content, not {kind(item)}")
        return {}
    where += "."
    _check_keys(item, MESSAGE_KEYS, problems, where)
    role = _text(item, "role", problems, where)
    content = _text(item, "content", problems, where)
    if role is not None and role not in ROLES:
        problems.add("unknown_role", f"{where}role must be {', '.join(ROLES)}; got {shown(role)}")
    if role == "assistant" and content is not None and not content.strip():
        problems.add("empty_assistant", f"{where}content is empty; give what the assistant should say")
    message: dict[str, Any] = {"role": role, "content": content}
    if "weight" in item:
        message["weight"] = _weight(item["weight"], role, problems, where)
    return message


def _weight(weight: Any, role: str | None, problems: Problems, where: str) -> int:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        problems.add("invalid_weight", f"{where}weight must be 0 (do not learn) or 1 (learn)")
        return 0
    if weight == 1 and role is not None and role != "assistant":
        problems.add("invalid_weight", f"{where}weight 1 is for assistant messages; remove it here")
    return int(weight)
