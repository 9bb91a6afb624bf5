"""The tables of the documentation that are made of the code, and where they stand.

    python -m tests.docs.tables     write them into the pages anew

A page marks the place of a table:

    <!-- table: settings-engine (written by python -m tests.docs.tables) -->
    | variable | default | meaning |
    ...
    <!-- end of table -->
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from pydantic_settings import BaseSettings

from service.engine.settings import EngineSettings
from service.http.schemas import fields
from service.settings import ServiceSettings
from tessera.defaults import BUNDLED_MODEL, LLAMA_LINEARS
from tessera.peft.methods import WAYS, Way
from tessera.settings import CommonSettings
from tests.deploy.exposed_metrics import service_registry, worker_registry
from trainer_worker.settings import WorkerSettings

DOCS = Path(__file__).parents[2] / "docs"
_COMMAND = "python -m tests.docs.tables"
_PLACE = re.compile(r"(<!-- table: ([a-z-]+) [^>]*-->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

SETTINGS: Mapping[str, type[BaseSettings]] = {
    "settings-common": CommonSettings,
    "settings-service": ServiceSettings,
    "settings-engine": EngineSettings,
    "settings-worker": WorkerSettings,
}


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(_line(cells) for cells in lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    if set(cells) == {"---"}:
        return f"|{'|'.join(cells)}|"
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def variables(cls: type[BaseSettings]) -> dict[str, str]:
    """Variable → its default, as the documentation writes it."""
    return {_variable(cls, name): written(field.default) for name, field in cls.model_fields.items()}


def _variable(cls: type[BaseSettings], name: str) -> str:
    return f"{cls.model_config.get('env_prefix', '')}{name}".upper()


def written(default: object) -> str:
    """A setting's default as one writes it: no path of this machine, 10 and not 10.0."""
    named = {
        None: "unset",
        LLAMA_LINEARS: "[seven layers](#default-basis)",
        str(BUNDLED_MODEL): "`models/tiny`",
    }
    if default in named:
        return named[default]
    is_whole = isinstance(default, bool) or (isinstance(default, float) and default.is_integer())
    return f"`{int(default) if is_whole else default}`"  # type: ignore[call-overload]


def settings_table(cls: type[BaseSettings]) -> str:
    rows = [
        (f"`{_variable(cls, name)}`", written(field.default), field.description or "")
        for name, field in cls.model_fields.items()
    ]
    return table(("variable", "default", "meaning"), rows)


def metrics_table(registry: CollectorRegistry) -> str:
    """Each of our metrics by its name as it is scraped, in the order in which the code defines them."""
    rows = []
    for family in registry.collect():
        if family.name.startswith("tessera_"):
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            suffix = "_total" if family.type == "counter" else ""
            rows.append(
                (f"`{family.name}{suffix}`", family.type, ", ".join(labels), family.documentation.rstrip("."))
            )
    return table(("name", "type", "labels", "meaning"), rows)


def ignored_table() -> str:
    rows = [(name, (where, why)) for where, names in fields.IGNORED.items() for name, why in names.items()]
    return _grouped(("where", "field", "why it changes nothing"), rows)


def neutral_table() -> str:
    rows = [
        (name, (where, _values(field.values), field.advice))
        for where, names in fields.NEUTRAL.items()
        for name, field in names.items()
    ]
    return _grouped(("where", "field", "let pass", "instead"), rows)


def other_names_table() -> str:
    rows = [
        (
            name,
            (
                where,
                f"`{other.field}`",
                ", ".join(f"`{json.dumps(k)}` is `{v}`" for k, v in other.values.items()),
            ),
        )
        for where, names in fields.OTHER_NAMES.items()
        for name, other in names.items()
    ]
    return _grouped(("where", "field", "means", "values"), rows)


def _grouped(header: tuple[str, ...], rows: Iterable[tuple[str, tuple[str, ...]]]) -> str:
    """(field, other cells) as a table; fields whose other cells are the same share a row."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows:
        grouped.setdefault(cells, []).append(f"`{name}`")
    return table(header, [(cells[0], ", ".join(names), *cells[1:]) for cells, names in grouped.items()])


def peft_table() -> str:
    rows = []
    for way in Way:
        names = [f"`{name}`" for name, known in WAYS.items() if known is way]
        rows.append((way.value, ", ".join(names)))
    return table(("what works", "`peft_type`"), rows)


def _values(allowed: tuple[Any, ...]) -> str:
    if allowed == fields.UNUSED:
        return "empty, false"
    return ", ".join(f"`{json.dumps(value)}`" for value in allowed) or "null"


#: Name of a table → what makes it.
TABLES: Mapping[str, Callable[[], str]] = {
    **{name: (lambda cls=cls: settings_table(cls)) for name, cls in SETTINGS.items()},  # type: ignore[misc]
    "metrics-service": lambda: metrics_table(service_registry()),
    "metrics-worker": lambda: metrics_table(worker_registry()),
    "fields-ignored": ignored_table,
    "fields-refused": neutral_table,
    "peft-methods": peft_table,
    "fields-other-names": other_names_table,
}


def rendered(page: str) -> str:
    """The page with every table that it marks made anew."""
    return _PLACE.sub(_made_anew, page)


def _made_anew(place: re.Match[str]) -> str:
    return f"<!-- table: {place[2]} (written by {_COMMAND}) -->\n{TABLES[place[2]]()}{place[4]}"


def marked(page: str) -> list[str]:
    return [place[2] for place in _PLACE.finditer(page)]


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write(f"wrote the tables of {path.name}\n")


if __name__ == "__main__":
    main()
