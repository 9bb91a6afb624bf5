"""`import tessera`: quick, complete, and as its docstring says."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tessera

ROOT = Path(__file__).parents[2]


def test_importing_it_loads_nothing_heavy():
    program = "import sys, tessera; print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)

    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", tessera.__all__)
def test_every_name_it_promises_is_there(name):
    assert getattr(tessera, name) is not None
    assert name in dir(tessera)


def test_the_names_are_those_of_the_modules_that_define_them():
    for name, module in tessera._MODULES.items():
        assert getattr(tessera, name) is getattr(importlib.import_module(module), name)
    assert {*tessera._MODULES, "__version__"} == set(tessera.__all__)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tessera' has no attribute 'Adaptor'"):
        tessera.Adaptor  # noqa: B018 - the access is what is tested


def test_the_example_of_its_docstring_runs(monkeypatch):
    monkeypatch.chdir(ROOT)  # it names the bundled model by its place in the repository

    failed, tried = doctest.testmod(tessera)

    assert failed == 0
    assert tried >= 9
