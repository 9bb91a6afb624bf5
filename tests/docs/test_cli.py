"""docs/cli.md lists every command, and what it shows can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from tessera.cli.app import app

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands
EXAMPLES = re.findall(r"^tessera .+$", TEXT, re.MULTILINE)


def test_every_command_has_a_row():
    assert re.findall(r"^\| `tessera ([a-z]+)` \|", TEXT, re.MULTILINE) == list(COMMANDS)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_option_of_an_example_exists(example):
    _, command, *arguments = shlex.split(example)
    known = {option for parameter in COMMANDS[command].params for option in parameter.opts}

    assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_every_check_of_the_doctor_has_a_row():
    source = Path(__file__).parents[2] / "tessera" / "cli" / "doctor"
    code = "".join(path.read_text(encoding="utf-8") for path in source.glob("*.py"))
    made = set(re.findall(r'(?:ok|warning|problem|finding)\(\s*"(\w+)"', code))
    section = TEXT.split("## What `doctor` looks at", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| ([a-z, ]+) \|", section, re.MULTILINE)
    told = {name for row in rows[1:] for name in row.split(", ")}

    assert made == told
