"""Walks: what a process records of itself, and what of that counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.walks.counting import Entry, Recording, count_walk
from benchmarks.walks.recorder.sitecustomize import ROLE_NAMES, role_of
from benchmarks.walks.stack import RECORDER, read_entries
from tests.waiting import HANG_S

SOURCE = """
import threading
from dataclasses import dataclass

@dataclass
class Point:
    x: int

def outer():
    return [inner(i) for i in range(3)]

def inner(i):
    return Point(i)

def before():
    pass

def tell(*recordings):
    with open("control", "r+b") as file:
        file.write(bytes(recordings))

before()
tell(7, 0, 0)
outer()
thread = threading.Thread(target=inner, args=(1,))
thread.start()
thread.join()
tell(0, 0, 0)
before()
"""


def test_a_process_records_its_own_functions_while_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "__init__.py").touch()
    (tmp_path / "service" / "__main__.py").write_text(SOURCE)
    (tmp_path / "control").write_bytes(bytes(len(ROLE_NAMES)))
    (tmp_path / "records").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(RECORDER), str(tmp_path)]),
        "WALKS_CONTROL": str(tmp_path / "control"),
        "WALKS_FOLDER": str(tmp_path / "records"),
        "WALKS_ROOT": str(tmp_path),
    }

    subprocess.run(
        [sys.executable, "-m", "service"], cwd=tmp_path, env=environment, check=True, timeout=HANG_S
    )

    entries = {entry.function: entry for entry in read_entries(tmp_path / "records") if entry.is_named}
    assert set(entries) == {"outer", "inner", "tell"}  # the last tells it to stop
    inner = entries["inner"]
    assert (inner.recording, inner.role, inner.file, inner.count) == (7, "api", "service/__main__.py", 4)
    assert inner.depth > entries["outer"].depth


def test_processes_are_told_apart_by_the_module_that_they_run() -> None:
    assert role_of(["python", "-m", "service"]) == "api"
    assert role_of(["python", "-I", "-m", "service.engine", "--socket", "path"]) == "engine"
    assert role_of(["python", "-m", "trainer_worker"]) == "trainer"
    assert role_of(["python", "-m", "service.local"]) is None
    assert role_of(["python", "-m", "service_of_others"]) is None
    assert role_of(["python", "service.py"]) is None


def entry(function: str, *, time_ns: int = 0, role: str = "api", count: int = 1) -> Entry:
    return Entry(
        recording=1,
        time_ns=time_ns,
        role=role,
        thread="MainThread",
        file=f"service/{function.lower()[0]}.py",
        function=function,
        line=1,
        depth=0,
        caller=None,
        count=count,
    )


def test_a_walk_holds_what_every_repetition_enters_and_idleness_does_not() -> None:
    seconds = {"api": 1.0, "engine": 1.0}
    first = [entry("second", time_ns=2), entry("first", time_ns=1), entry("once", time_ns=3)]
    constant = [
        entry("poll", count=9),
        entry("count_up", count=2),
        entry("read", count=30),
        entry("f.<lambda>"),
    ]
    in_engine = [entry("first", role="engine", time_ns=4)]
    repetitions = [
        Recording([*first, *constant, *in_engine], seconds),
        Recording([*first[:2], *constant, *in_engine], seconds),
    ]
    idle = Recording(
        [entry(name, count=50) for name in ("poll", "read", "count_up")], {"api": 10.0, "engine": 10.0}
    )

    walk = count_walk("chat", repetitions, idle)

    assert [(e.role, e.function) for e in walk.entries] == [
        ("api", "read"),
        ("api", "first"),
        ("api", "second"),
        ("engine", "first"),
    ]
    assert len(walk.functions) == 3
    assert walk.files == ["service/r.py", "service/f.py", "service/s.py"]
    assert walk.part(role="engine").functions == [("service/f.py", "first", 1)]
    assert [(row["part"], row["files"], row["functions"]) for row in walk.to_rows()] == [
        ("all", 3, 3),
        ("process api", 3, 3),
        ("process engine", 1, 1),
        ("room service", 3, 3),
    ]
