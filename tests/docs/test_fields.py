"""`docs/compatibility.md` shows the ignored fields and neutral values of `service/http/schemas/fields.py`."""

from __future__ import annotations

from pathlib import Path

from tests.docs.tables import ignored_table, neutral_table, other_names_table

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_the_tables_in_the_documentation_are_those_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")

    assert ignored_table() in text, ignored_table()
    assert neutral_table() in text, neutral_table()
    assert other_names_table() in text, other_names_table()
