"""docs/methods.md names every method, initialization, preset and LoRA form, and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tessera.methods.bases import METHODS
from tessera.methods.forms import LORA_PRESETS
from tessera.methods.init import INIT_METHODS, PRESETS
from trainer_worker.training.learning_rates import (
    DEFAULT_PEAK_STEP,
    LARGE_STEP,
    PEAK_STEPS,
    POPULATION_STEP,
    SMALL_STEP,
)

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/methods.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> set[str]:
    """The names in the first column of the tables under a heading."""
    section = TEXT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    cells = (line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    return {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("Bases", METHODS),
        ("Initializations", INIT_METHODS),
        ("Presets", PRESETS),
        ("The LoRA form", LORA_PRESETS),
    ],
)
def test_every_name_has_a_row(heading: str, names: dict[str, object]) -> None:
    assert first_cells(heading) == set(names)


def test_the_table_of_steps_is_the_one_in_use() -> None:
    rows = dict.fromkeys(METHODS, 0.0)
    section = TEXT.split("## The automatic learning rate", 1)[1].split("\n## ", 1)[0]
    for line in section.splitlines():
        if (found := re.fullmatch(r"\| (`.+) \| ([\d.e-]+)(?: \(default\))? \|", line)) is not None:
            rows |= dict.fromkeys(re.findall(r"`([a-z_]+)`", found[1].split(", other")[0]), float(found[2]))
    assert rows == {name: PEAK_STEPS.get(name, DEFAULT_PEAK_STEP) for name in METHODS}
    assert {SMALL_STEP, LARGE_STEP, POPULATION_STEP, DEFAULT_PEAK_STEP} == set(rows.values())


def test_the_tests_that_are_named_exist() -> None:
    names = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert set(re.findall(r"`(test_[a-z0-9_]+)`", TEXT)) <= names
    ids = set(re.findall(r"\b(?:XS|SB|DA|[GMLB])\d\b", TEXT))
    words = {word for name in names for word in name.split("_")}
    assert {name.lower() for name in ids} <= words
    assert len(ids) > 20
    files = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", TEXT)
    assert [name for name in files if not (ROOT / name).is_file()] == []
