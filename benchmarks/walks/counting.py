"""What counts: from recorded entries to the files and functions of one walk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

#: Lambdas and comprehensions belong to the function around them, imports to none.
_UNNAMED = ("<lambda>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<module>")
#: What an idle service enters, too, is left out unless a repetition enters it at least so many times in the
#: mean (by half of its tokens, say), and IDLE_FACTOR times as often as the idle service in the same time.
MIN_ENTRIES, IDLE_FACTOR = 8, 2

#: A function in one kind of process.
Place = tuple[str, tuple[str, str, int]]


@dataclass(frozen=True)
class Entry:
    """A function that a process entered in one recording, as it was when it did so first."""

    #: Number of the recording; every repetition of a walk has its own.
    recording: int
    #: By the machine's monotonic clock, which all processes share.
    time_ns: int
    #: "api", "engine" or "trainer".
    role: str
    thread: str
    #: Relative to the root of the checkout.
    file: str
    #: Qualified name.
    function: str
    #: Its first line, which tells apart functions of the same name (a property and its setter).
    line: int
    #: Number of our own functions below it on the stack.
    depth: int
    #: "file:function" of the nearest of them.
    caller: str | None
    #: How often it was entered; resuming a coroutine or a generator is entering it, too.
    count: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.file, self.function, self.line

    @property
    def is_named(self) -> bool:
        return self.function.rpartition(".")[2] not in _UNNAMED

    @property
    def room(self) -> str:
        return str(PurePosixPath(self.file).parent)


@dataclass(frozen=True)
class Recording:
    """One repetition of a walk, or some time without work."""

    entries: Sequence[Entry]
    #: Seconds that it lasted in each kind of process that took part.
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Walk:
    """The functions of a walk, in the order of their first entry, once per kind of process."""

    name: str
    entries: Sequence[Entry]

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(entry.file for entry in self.entries))

    @property
    def functions(self) -> list[tuple[str, str, int]]:
        """Each once, in however many kinds of processes it is entered."""
        return list(dict.fromkeys(entry.key for entry in self.entries))

    def part(self, *, role: str | None = None, room: str | None = None) -> Walk:
        """What of it happens in one kind of process, or in one room."""
        kept = [e for e in self.entries if role in (None, e.role) and room in (None, e.room)]
        return Walk(self.name, kept)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for the whole, one per kind of process, one per room."""
        roles = list(dict.fromkeys(entry.role for entry in self.entries))
        rooms = sorted({entry.room for entry in self.entries})
        parts = [
            ("all", self),
            *((f"process {role}", self.part(role=role)) for role in roles),
            *((f"room {room}", self.part(room=room)) for room in rooms),
        ]
        return [
            {"walk": self.name, "part": name, "files": len(part.files), "functions": len(part.functions)}
            for name, part in parts
        ]


def count_walk(name: str, repetitions: Sequence[Recording], idle: Recording) -> Walk:
    """The walk: what every repetition enters, except what an idle service enters, too."""
    counts, idle_counts = _counts(repetitions), _counts([idle])
    common = set.intersection(*({(e.role, e.key) for e in each.entries} for each in repetitions))

    def belongs(place: Place) -> bool:
        if place not in idle_counts:
            return True
        role, _ = place
        idle_rate = idle_counts[place] / idle.seconds[role]
        expected = idle_rate * sum(each.seconds[role] for each in repetitions)
        return counts[place] >= max(MIN_ENTRIES * len(repetitions), IDLE_FACTOR * expected)

    entries = [e for e in repetitions[0].entries if e.is_named and (e.role, e.key) in common]
    kept = [entry for entry in entries if belongs((entry.role, entry.key))]
    return Walk(name, sorted(kept, key=lambda entry: entry.time_ns))


def _counts(recordings: Iterable[Recording]) -> Counter[Place]:
    counts: Counter[Place] = Counter()
    for recording in recordings:
        for entry in recording.entries:
            counts[entry.role, entry.key] += entry.count
    return counts
