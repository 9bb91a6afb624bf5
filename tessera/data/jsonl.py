"""Reading JSON lines so that all problems of a file are found at once, with their line numbers.

Blank lines, a UTF-8 byte order mark and CRLF are allowed. Other encodings, compressed files and JSON arrays
are recognised, so that the message says what to do. This module does not know what the objects mean;
`examples.py` does.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from tessera.errors import InvalidTrainingData, LineError

#: Longest excerpt of a user's data in an error message.
MAX_SHOWN_CHARS = 40

_WIDE_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh")
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_ARRAY = "the file is a JSON array; write one JSON object per line, with no brackets or commas round them"


class Problems:
    """The first `max_errors` problems of a file, and the number of all of them."""

    def __init__(self, max_errors: int) -> None:
        self.max_errors = max_errors
        self.listed: list[LineError] = []
        self.total = 0
        self.line = 1  # the line that is being read
        self._first_unlisted = 0

    def add(self, code: str, message: str) -> None:
        """Note a problem of the current line. Beyond `max_errors`, problems are only counted."""
        self.total += 1
        if len(self.listed) < self.max_errors:
            self.listed.append(LineError(self.line, code, message))
        elif not self._first_unlisted:
            self._first_unlisted = self.line

    def raise_if_any(self, *, code: str | None = None) -> None:
        """Raise `InvalidTrainingData` if there are problems. One last entry counts those beyond the limit."""
        errors = list(self.listed)
        if unlisted := self.total - len(errors):
            more = f"{unlisted} more problem(s) from here on are not listed; correct these first"
            errors.append(LineError(self._first_unlisted, "more_errors", more))
        if errors:
            raise InvalidTrainingData(errors, code=code, num_problems=self.total)


class _Unreadable(Exception):
    """The line does not contain an object."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def read_objects(
    content: bytes, problems: Problems, *, max_line_bytes: int, max_lines: int
) -> Iterator[dict[str, Any] | None]:
    """Yield the object of each line that is not blank, or None for a line with a problem.

    `problems.line` is the number of the line. Raises `InvalidTrainingData` at once for a file that is not
    JSONL.
    """
    _check_file(content, problems)
    for count, (problems.line, raw) in enumerate(_lines(content)):
        if count >= max_lines:
            problems.add("too_many_examples", f"a file holds at most {max_lines} examples; remove the rest")
            return
        try:
            if len(raw) > max_line_bytes:
                message = f"the line has {len(raw)} bytes, the limit is {max_line_bytes}; split the example"
                raise _Unreadable("line_too_long", message)
            yield _read_object(raw)
        except _Unreadable as problem:
            problems.add(problem.code, problem.message)
            yield None


def kind(value: Any) -> str:
    """Return the kind of a JSON value, for use in a sentence."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(text: str) -> str:
    """Quote the beginning of a text, in ASCII."""
    return json.dumps(text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…")


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (number, bytes) of the lines that are not blank, counted from 1.

    Only "\\n" ends a line, because JSON may contain U+2028. Blank lines are skipped by two searches instead
    of one by one: 33 million of them took 24 s.
    """
    start, line = (len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0), 1
    while (found := _NOT_BLANK.search(content, start)) is not None:
        line += content.count(b"\n", start, found.start())
        end = content.find(b"\n", found.start())
        start = len(content) if end < 0 else end
        yield line, content[found.start() : start].rstrip(b" \t\r")


def _check_file(content: bytes, problems: Problems) -> None:
    """Report a problem of the whole file once, instead of the same problem on every line."""
    head = content[:64]
    if head.startswith(_COMPRESSED):
        problems.add("compressed_file", "the file is compressed; upload the JSONL file itself")
    elif head.startswith(_WIDE_BOMS) or b"\x00" in head:
        problems.add("not_utf8", "the file is UTF-16, UTF-32 or binary; save it as UTF-8 and upload it again")
    elif _is_array(content):
        problems.add("json_array", _ARRAY)
    problems.raise_if_any()


def _is_array(content: bytes) -> bool:
    """Return whether the file is one JSON array, on one line or on many."""
    lines = _lines(content)
    _, first = next(lines, (0, b""))
    if not first.startswith(b"["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return next(lines, None) is None


def _read_object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
        raise _Unreadable("not_utf8", message) from None
    except json.JSONDecodeError as error:
        raise _Unreadable("invalid_json", _explain(text, error)) from None
    except (ValueError, RecursionError) as error:
        raise _Unreadable("invalid_json", f"the line cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise _Unreadable("not_an_object", f"a line must be one JSON object, not {kind(value)}")
    return value


def _explain(text: str, error: json.JSONDecodeError) -> str:
    rest = text[error.pos :].lstrip()
    if error.msg == "Extra data" and rest.startswith((",", "{")):
        return f"more than one JSON value (column {error.colno}); write one JSON object per line"
    if not rest:
        return f"the JSON ends too early (column {error.colno}); each line must be one complete object"
    return f"not valid JSON: {error.msg} (column {error.colno})"


def _refuse_constant(name: str) -> Any:
    raise _Unreadable("invalid_json", f"{name} is not a JSON value")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise _Unreadable("duplicate_key", f"the key {shown(key)} occurs twice in one object; remove one")
        keys[key] = value
    return keys
