"""pyproject.toml declares what the code imports: the library's dependencies, and the applications' extra."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"tessera", "service", "trainer_worker", "examples"}
#: Used where it is installed, done without where it is not.
OPTIONAL = {"uvloop"}
#: Come with one that is declared, and are a part of its interface.
ALONG = {
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "pydantic_core": "pydantic",
    "starlette": "fastapi",
    # Only where there is CUDA, with torch's build for it.
    "triton": "torch",
}


def names(requirements: Iterable[str]) -> set[str]:
    return {normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported(folder: str) -> Iterator[str]:
    """The first part of every absolute import below a folder, the standard library and ourselves left out."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found = [node.module]
            else:
                continue
            yield from {name.split(".")[0] for name in found} - OURS - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("tessera", []),
        ("service", ["service"]),
        ("trainer_worker", ["service"]),
        ("examples", ["service", "demo"]),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    optional = PROJECT["optional-dependencies"]
    declared = names([*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])])
    known = packages_distributions()

    missing = {
        module
        for module in set(imported(folder)) - OPTIONAL
        if not {normal(name) for name in [ALONG.get(module, ""), *known.get(module, [])]} & declared
    }

    assert missing == set()


def test_the_service_is_no_part_of_what_the_library_needs():
    assert not names(PROJECT["dependencies"]) & names(PROJECT["optional-dependencies"]["service"])


def test_everything_is_pinned():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normal(line.split("==")[0]) for line in constraints if "==" in line}
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    lines = [*PROJECT["dependencies"], *groups["dev"]]
    lines += [line for extra in PROJECT["optional-dependencies"].values() for line in extra]

    assert names(lines) - pinned == {"triton"}, "a CUDA build of torch pins its own Triton"
