"""The report, as lines for people or one JSON object for programs, and the resulting exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tessera.cli.doctor.findings import Finding, Level

EXIT_PROBLEM = 1
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def show(findings: Iterable[Finding], *, as_json: bool = False) -> int:
    """Print findings as they arrive, or all at once as JSON, and return the exit status."""
    if as_json:
        found = list(findings)
        whole = {"status": worst(found), "findings": [asdict(finding) for finding in found]}
        sys.stdout.write(json.dumps(whole, indent=2) + "\n")
    else:
        found = list(_printed(findings, Console(highlight=False)))
    return EXIT_PROBLEM if worst(found) is Level.PROBLEM else 0


def worst(findings: Iterable[Finding]) -> Level:
    """Return the most severe level of the findings, OK if there are none."""
    levels = {finding.level for finding in findings}
    return next((level for level in reversed(Level) if level in levels), Level.OK)


def _printed(findings: Iterable[Finding], console: Console) -> Iterable[Finding]:
    counts = dict.fromkeys(Level, 0)
    for finding in findings:
        counts[finding.level] += 1
        console.print(_line(finding))
        yield finding
    problems, warnings = counts[Level.PROBLEM], counts[Level.WARNING]
    console.print()
    console.print(f"{_number(problems, 'problem')}, {_number(warnings, 'warning')}")


def _line(finding: Finding) -> Table:
    line = Table.grid(padding=(0, 2))
    line.add_column(width=len("warning"))
    line.add_column(width=len("applications"))
    line.add_column(overflow="fold")
    text = Text(finding.message)
    if finding.advice:
        text.append(f"\n→ {finding.advice}", style="italic")
    name = finding.level.value
    line.add_row(Text(name.upper() if name == "ok" else name, _STYLES[finding.level]), finding.check, text)
    return line


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
