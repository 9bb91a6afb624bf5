"""`docs/api.md` shows what `service/http/schemas/fields.py` lets pass: ignored fields, neutral values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from service.http.schemas import fields

API = Path(__file__).parents[2] / "docs" / "api.md"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, tuple[str, ...]]]) -> str:
    """(field, other cells) as a table; fields whose other cells are the same share a row."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows:
        grouped.setdefault(cells, []).append(f"`{name}`")
    lines = [header, ("---",) * len(header)]
    lines += [(cells[0], ", ".join(names), *cells[1:]) for cells, names in grouped.items()]
    return "\n".join("|".join(["", *(f" {c} " if c != "---" else c for c in line), ""]) for line in lines)


def ignored_table() -> str:
    rows = [(name, (where, why)) for where, names in fields.IGNORED.items() for name, why in names.items()]
    return table(("where", "field", "why it changes nothing"), rows)


def neutral_table() -> str:
    rows = [
        (name, (where, values(field.values), field.advice))
        for where, names in fields.NEUTRAL.items()
        for name, field in names.items()
    ]
    return table(("where", "field", "let pass", "instead"), rows)


def values(allowed: tuple[Any, ...]) -> str:
    if allowed == fields.UNUSED:
        return "empty, false"
    return ", ".join(f"`{json.dumps(value)}`" for value in allowed) or "null"


def test_the_tables_in_the_documentation_are_those_of_the_code() -> None:
    text = API.read_text(encoding="utf-8")

    assert ignored_table() in text, ignored_table()
    assert neutral_table() in text, neutral_table()
