"""What a check says: one finding a subject that it looked at, with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    #: It works, but not as somebody who knew would have it.
    WARNING = "warning"
    #: `serve` or `worker` fails, refuses requests, or loses data.
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    #: What was looked at: "store", "model", …; several findings may share it.
    check: str
    level: Level
    #: What was found.
    message: str
    #: What to do; empty for what is in order.
    advice: str = ""


def ok(check: str, message: str) -> Finding:
    return Finding(check, Level.OK, message)


def warning(check: str, message: str, advice: str) -> Finding:
    return Finding(check, Level.WARNING, message, advice)


def problem(check: str, message: str, advice: str) -> Finding:
    return Finding(check, Level.PROBLEM, message, advice)
