"""The documentation says what the code does: settings, metrics, alerts, routes, keys, names and links."""

from __future__ import annotations

import ast
import inspect
import os
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from tessera.redis import keys
from tests.deploy.exposed_metrics import service_registry, worker_registry
from tests.docs.tables import SETTINGS, TABLES, marked, metrics_table, rendered, variables

ROOT = Path(__file__).parents[2]
#: Every page but the log of decisions, which names what there was.
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "decisions.md")

#: What the arguments of the functions in `keys.py` are called in the documentation, and a value for each.
ARGUMENTS = {
    "tenant": "acme",
    "adapter_id": "anna",
    "version": 3,
    "number": 7,
    "basis_id": "ab",
    "index": 0,
    "file_id": "file-1",
    "digest": "cd",
    "job_id": "ftjob-1",
    "worker_id": "host-1",
}


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def rows(text: str) -> set[tuple[str, ...]]:
    """The cells of every line that is a row of a table."""
    lines = (line for line in text.splitlines() if line.startswith("| "))
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines}


def test_every_setting_is_documented_with_its_default():
    known = {item for cls in SETTINGS.values() for item in variables(cls).items()}
    told = {
        (row[0].strip("`"), row[1]) for row in rows(read("settings.md")) if row[0].startswith("`TESSERA_")
    }

    assert told == known


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_that_is_named_exists(name):
    named = set(re.findall(r"\bTESSERA_[A-Z0-9_]*[A-Z0-9]", read(name)))

    assert named <= {variable for cls in SETTINGS.values() for variable in variables(cls)}


def families(registry: CollectorRegistry) -> set[tuple[str, ...]]:
    """Name as it is scraped, type and labels of each of our metrics."""
    return {row[:3] for row in rows(metrics_table(registry)) if row[0] != "name"}


def test_every_metric_is_documented_with_its_type_and_labels():
    told = {row[:3] for row in rows(read("operations.md")) if row[0].startswith("`tessera_")}

    assert told == families(service_registry()) | families(worker_registry())


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_made_of_the_code_are_up_to_date(name):
    page = read(name)

    assert page == rendered(page), "run python -m tests.docs.tables"


def test_every_table_made_of_the_code_stands_in_one_page():
    assert sorted(table for name in PAGES for table in marked(read(name))) == sorted(TABLES)


def test_every_alert_is_documented_with_its_severity():
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))
    told = {row[:2] for row in rows(read("operations.md")) if row[0].startswith("`Tessera")}

    known = [rule for group in alerts["groups"] for rule in group["rules"] if "alert" in rule]
    assert told == {(f"`{rule['alert']}`", rule["labels"]["severity"]) for rule in known}


def test_every_route_has_a_heading(app):
    routes = {f"{method.upper()} {path}" for path, item in app.openapi()["paths"].items() for method in item}
    told = re.findall(r"^### `([A-Z]+ /\S*)`$", read("api.md"), re.MULTILINE)

    assert set(told) == routes
    assert len(told) == len(routes)


def stored_keys() -> set[str]:
    """One key of each kind that `keys.py` names."""
    found = {value for name, value in vars(keys).items() if name.startswith("QUEUE_")}
    for name, function in inspect.getmembers(keys, inspect.isfunction):
        wanted = inspect.signature(function).parameters
        if not name.startswith("_") and function.__module__ == keys.__name__ and name != "bucket":
            found.add(function(**{argument: ARGUMENTS[argument] for argument in wanted}))
    return found


def test_every_key_is_documented():
    told = [row[0].strip("`") for row in rows(read("protocol.md")) if row[0].startswith("`tessera:")]
    patterns = [re.compile(re.sub("<[a-z_]+>", "[^:{}]+", re.escape(key))) for key in told]
    matches = [[key for key in stored_keys() if pattern.fullmatch(key)] for pattern in patterns]

    assert [key for key, found in zip(told, matches, strict=True) if len(found) != 1] == []
    assert {key for found in matches for key in found} == stored_keys()


def test_every_decision_is_in_the_index():
    text = read("decisions.md")
    index, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    listed = re.findall(r"\]\(#([^)]+)\)", index)

    assert sorted(listed) == sorted(anchor(section.partition("\n")[0]) for section in sections)


@cache
def defined_names(path: Path) -> set[str]:
    """Functions, classes and methods (`Class.method`) of a Python file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name")}
    return names


@pytest.mark.parametrize("name", PAGES)
def test_every_name_of_the_code_exists(name):
    references = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|yml|json|md))(?::([\w.]+))?`", read(name))
    unknown = [
        f"{path}:{symbol}"
        for path, symbol in references
        if not (ROOT / path).is_file() or (symbol and symbol not in defined_names(ROOT / path))
    ]

    assert unknown == []


def markdown_files() -> list[Path]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("build", "dist")]
        found += [Path(folder, name) for name in names if name.endswith(".md")]
    return sorted(found)


def anchors(path: Path) -> set[str]:
    """The fragments that the headings of a file answer to."""
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)}


def anchor(heading: str) -> str:
    """The fragment of a heading, as GitHub and most others make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, fragment = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = path.parent / file if file else path
        if not linked.exists() or (fragment and fragment not in anchors(linked)):
            broken.append(target)

    assert broken == []
