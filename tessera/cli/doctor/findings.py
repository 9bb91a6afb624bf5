"""The findings of a check: one for each thing that it examined, with advice on what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    #: It works, but an informed operator would configure it differently.
    WARNING = "warning"
    #: `serve` or `worker` fails, refuses requests, or loses data.
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    #: The name of the subject: "store", "model", …; several findings may share it.
    check: str
    level: Level
    message: str
    #: What to do about it; empty if everything is in order.
    advice: str = ""


def ok(check: str, message: str) -> Finding:
    return Finding(check, Level.OK, message)


def warning(check: str, message: str, advice: str) -> Finding:
    return Finding(check, Level.WARNING, message, advice)


def problem(check: str, message: str, advice: str) -> Finding:
    return Finding(check, Level.PROBLEM, message, advice)
