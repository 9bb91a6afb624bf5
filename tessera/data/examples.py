"""Reading training files: JSON lines become examples, and all problems of a file are reported at once.

A line is of one of four kinds, which a file may mix:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…", "weight": 1}]}
    {"prompt": [{"role": "user", "content": "…"}], "completion": [{"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}
    {"text": "…"}

A key with the value null counts as absent. In a file that builds a basis, either all lines or none may have a
key `user`, which names the user of the example. `messages.py` defines what a message may contain.

A line that `parse_examples` accepts has at least one character to train on. This module knows no tokenizer
and no template; `ChatFormat.check` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from tessera.data.jsonl import Problems, kind, read_objects, shown
from tessera.data.messages import check_keys, check_learned, read_messages, read_text
from tessera.errors import InvalidInput, InvalidTrainingData, LineError

T = TypeVar("T")


class HasLine(Protocol):
    """What was read from a line of a file."""

    @property
    def line(self) -> int: ...


Item = TypeVar("Item", bound=HasLine)

FORMATS = '{"messages": […]}, {"prompt": "…", "completion": "…"} or {"text": "…"}'

#: 1 MiB is about 200,000 words. No example of that length fits a context, but a file that is not JSONL has
#: such lines.
MAX_LINE_BYTES = 1024 * 1024
#: For a limit that no setting gives.
MAX_EXAMPLES = 1_000_000
#: Problems listed for one file; further ones are only counted.
MAX_LISTED_ERRORS = 100
#: Length of the name of a user, which is an id or an address, not a text.
MAX_USER_CHARS = 256
#: The examples of a user are split into some for training and some for measuring.
MIN_USER_EXAMPLES = 2

_TO_MESSAGES = 'write {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}'
_PREFERENCE = (
    "a pair of answers: write pairs into a file of their own, for jobs with the method dpo; or write the "
    "preferred answer alone"
)
#: Formats of other tools: keys by which they are recognised, and what to write instead.
_OTHER_FORMATS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"preferred_output"}), f"{_PREFERENCE}, as {FORMATS}"),
    (frozenset({"non_preferred_output"}), f"{_PREFERENCE}, as {FORMATS}"),
    (frozenset({"chosen"}), f"{_PREFERENCE}, as {FORMATS}"),
    (frozenset({"rejected"}), f"{_PREFERENCE}, as {FORMATS}"),
    (
        frozenset({"prompt", "completion", "label"}),
        "rated answers; leave bad answers out, or write pairs for the method dpo",
    ),
    (
        frozenset({"instruction", "output"}),
        f"{_TO_MESSAGES}: user is instruction and input, assistant output",
    ),
    (
        frozenset({"conversations"}),
        f"{_TO_MESSAGES}: from human is role user, gpt is assistant, value is content",
    ),
    (frozenset({"conversation"}), f"{_TO_MESSAGES}: one message for every turn"),
    (frozenset({"contents"}), f"{_TO_MESSAGES}: role model is assistant, the text of parts is content"),
    (frozenset({"system", "messages"}), 'put the system text into messages, first: {"role": "system", …}'),
    (frozenset({"prompt", "response"}), "call response completion"),
    (frozenset({"prompt", "output"}), "call output completion"),
    (frozenset({"prompt", "answer"}), "call answer completion"),
    (frozenset({"instruction", "response"}), f"{_TO_MESSAGES}: user is instruction, assistant response"),
    (frozenset({"question", "response"}), _TO_MESSAGES),
    (frozenset({"user", "assistant"}), _TO_MESSAGES),
    (frozenset({"custom_id", "body"}), "a line of a batch; write its messages and the answer to them"),
    (frozenset({"question", "answer"}), _TO_MESSAGES),
    (frozenset({"query", "response"}), _TO_MESSAGES),
    (frozenset({"input", "output"}), _TO_MESSAGES),
    (frozenset({"input_ids"}), f"token ids are not taken; write their text, as {FORMATS}"),
)


@dataclass(frozen=True)
class Example:
    """One training item: a conversation, a prompt with its completion, or a text. The others are None."""

    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    user: str | None = None  # the user of the example, if the file names one
    line: int = 0  # number of its line in the file, counted from 1


def parse_examples(
    content: bytes,
    *,
    max_errors: int = MAX_LISTED_ERRORS,
    max_line_bytes: int = MAX_LINE_BYTES,
    max_examples: int = MAX_EXAMPLES,
    with_users: bool = False,
) -> list[Example]:
    """Read the examples of a JSONL file, in order. Blank lines, a UTF-8 byte order mark and CRLF are allowed.

    with_users: allow the key `user`, which is otherwise an unknown key.

    Raises `InvalidTrainingData` with the problems of all lines. Beyond `max_errors` they are only counted, in
    one last entry with the code "more_errors". The error for a file without examples has the code
    "empty_file".
    """
    problems = Problems(max_errors)
    examples = list(
        _read_examples(
            content,
            problems,
            max_line_bytes=max_line_bytes,
            max_examples=max_examples,
            with_users=with_users,
        )
    )
    _finish_check(examples, len(examples), problems)
    return examples


class ExampleFile:
    """The examples of a JSONL file that has been checked. Each iteration reads them again, one at a time.

    So a file takes its own size in memory and not that of its examples, which is five times as large.
    """

    def __init__(self, content: bytes, *, max_examples: int = MAX_EXAMPLES, with_users: bool = False) -> None:
        """Check the file. Raises `InvalidTrainingData` like `parse_examples`."""
        self._content, self._max_examples, self._with_users = content, max_examples, with_users
        problems = Problems(MAX_LISTED_ERRORS)
        checked = (
            Example(user=example.user, line=example.line) if with_users else None
            for example in self._read(problems)
        )
        users = list(checked) if with_users else [None] * sum(1 for _ in checked)
        _finish_check([example for example in users if example is not None], len(users), problems)
        self._size = len(users)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Example]:
        return self._read(Problems(0))

    def _read(self, problems: Problems) -> Iterator[Example]:
        return _read_examples(
            self._content,
            problems,
            max_line_bytes=MAX_LINE_BYTES,
            max_examples=self._max_examples,
            with_users=self._with_users,
        )


def _read_examples(
    content: bytes, problems: Problems, *, max_line_bytes: int, max_examples: int, with_users: bool
) -> Iterator[Example]:
    """Yield the examples of a file, and add what is wrong with it to `problems`."""
    for value in read_objects(content, problems, max_line_bytes=max_line_bytes, max_lines=max_examples):
        if value is not None:
            value = {key: item for key, item in value.items() if item is not None}
            user = _user(value, problems) if with_users else None
            yield replace(_example(value, problems), user=user)


def _finish_check(examples: Sequence[Example], num_examples: int, problems: Problems) -> None:
    """Check a whole file. examples: with their users, if lines may name users. Raises
    `InvalidTrainingData`."""
    _check_users(examples, problems)
    problems.raise_if_any()
    if not num_examples:
        problems.line = 1
        problems.add("empty_file", "the file has no example; write one JSON object per line")
        problems.raise_if_any(code="empty_file")


def for_each(examples: Iterable[Item], work: Callable[[Item], T], *, param: str = "file") -> list[T]:
    """Apply `work` to every example or pair and return the results.

    Raises `InvalidTrainingData` with the lines of all examples for which `work` raises `InvalidInput`.
    """
    results: list[T] = []
    errors: list[LineError] = []
    num_problems = 0
    for example in examples:
        try:
            results.append(work(example))
        except InvalidInput as error:
            num_problems += 1
            if len(errors) < MAX_LISTED_ERRORS:
                errors.append(LineError(example.line, error.code, error.message))
    if errors:
        raise InvalidTrainingData(errors, param=param, num_problems=num_problems)
    return results


def _example(value: dict[str, Any], problems: Problems) -> Example:
    """Make the example of one line, and add what is wrong with it to `problems`."""
    line = problems.line
    for keys, advice in _OTHER_FORMATS:
        if keys <= value.keys():
            problems.add("other_format", f"{advice} (the line has {', '.join(map(shown, sorted(keys)))})")
            return Example(line=line)
    if "messages" in value:
        check_keys(value, ("messages",), problems)
        return Example(messages=_conversation(value["messages"], problems), line=line)
    if isinstance(value.get("prompt"), list) or isinstance(value.get("completion"), list):
        check_keys(value, ("prompt", "completion"), problems)
        return Example(messages=_prompt_and_completion(value, problems), line=line)
    if "prompt" in value or "completion" in value:
        check_keys(value, ("prompt", "completion"), problems)
        prompt = read_text(value, "prompt", problems)
        completion = read_text(value, "completion", problems)
        if completion is not None and not completion.strip():
            problems.add("empty_completion", "completion is empty; give the text to be learned")
        return Example(prompt=prompt, completion=completion, line=line)
    if "text" in value:
        check_keys(value, ("text",), problems)
        text = read_text(value, "text", problems)
        if text is not None and not text.strip():
            problems.add("empty_text", "text is empty; give the text to be learned, or remove the line")
        return Example(text=text, line=line)
    given = ", ".join(shown(key) for key in list(value)[:5]) or "none"
    problems.add("unknown_format", f"a line must be {FORMATS}; the keys of this one: {given}")
    return Example(line=line)


def _user(value: dict[str, Any], problems: Problems) -> str | None:
    """Take the user out of the line: None if it names none, "" if the name is not valid."""
    if "user" not in value:
        return None
    user = read_text(value, "user", problems)
    del value["user"]
    if user is not None and not 0 < len(user) <= MAX_USER_CHARS:
        problems.add("invalid_user", f"user must have 1 to {MAX_USER_CHARS} characters, not {len(user)}")
        return ""
    return user or ""


def _check_users(examples: Sequence[Example], problems: Problems) -> None:
    """Report lines without a user if other lines have one, and users with too few examples.

    The latter are not reported in a file with other problems, because those lines may be their missing
    examples.
    """
    first = next((example for example in examples if example.user is not None), None)
    if first is None:
        return
    has_other_problems = problems.total > 0
    counts = Counter(example.user for example in examples)
    for example in examples:
        problems.line = example.line
        if example.user is None:
            hint = f"line {first.line} has one; give every line a user, or none"
            problems.add("missing_user", f"the line has no user, but {hint}")
        elif not has_other_problems and counts[example.user] < MIN_USER_EXAMPLES:
            message = f"user {shown(example.user)} has only this example; give every user {MIN_USER_EXAMPLES}"
            problems.add("user_too_small", f"{message} or more")


def _prompt_and_completion(value: dict[str, Any], problems: Problems) -> tuple[dict[str, Any], ...] | None:
    """Join a prompt and a completion that are lists of messages. Only the completion is learned."""
    for key in ("prompt", "completion"):
        if not isinstance(value.get(key), list):
            actual = kind(value.get(key)) if key in value else "missing"
            other = "completion" if key == "prompt" else "prompt"
            message = f"{other} is a list of messages, so {key} must be one too; it is {actual}"
            problems.add("wrong_type", message)
            return None
    prompt = read_messages(value["prompt"], "prompt", problems, is_context=True)
    completion = read_messages(value["completion"], "completion", problems)
    if prompt is None or completion is None:
        return None
    context = [message if message["role"] != "assistant" else {**message, "weight": 0} for message in prompt]
    check_learned(completion, "completion", problems)
    return (*context, *completion)


def _conversation(value: Any, problems: Problems) -> tuple[dict[str, Any], ...] | None:
    messages = read_messages(value, "messages", problems)
    if messages is not None:
        check_learned(messages, "messages", problems)
    return messages
