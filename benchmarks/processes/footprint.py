"""What does an idle installation cost? Memory of each process of `make serve`, and the time until ready.

    python -m benchmarks.processes.footprint [--rounds 3] [--against 45babb2] [--json FILE]

`python -m service.local` is started with the bundled model and a store of its own, watched until it can take
requests, left alone until no process does anything, and measured. With --against, the program of that commit
is checked out beside this one and both are measured in turn, so that whatever else the machine does falls on
both; then the last row is the ratio of the two. Figures are medians over the rounds.

    rss_mb       resident memory; pages that several processes share count in each of them
    pss_mb       the same, but a shared page counts in equal parts: the sum is what the machine has to have
    uss_mb       pages that no other process has
    cpu_s        processor time until the service was ready; hardly depends on what else the machine does
    idle_cpu_s   the same until all processes were idle
    seconds      from the start until the service was ready, in the row of the sum

The time line tells, for the last round, when each process began and what the service said of itself.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.report import print_table, save
from tessera.processes.child_process import start_child

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 300.0
POLL_S = 0.05
#: A tree that uses less than this share of one core for SETTLE_S is idle. It is measured after at most
#: MAX_SETTLE_S all the same.
IDLE_SHARE, SETTLE_S, MAX_SETTLE_S = 0.1, 3.0, 90.0
MB = 1e6
#: By a part of the command line, in the order in which it is looked for. The twin of an API process has its
#: command line, too.
ROLES = {
    "service.local": "supervisor",
    "service.engine": "engine",
    "trainer_worker": "trainer",
    "redis.sock": "store",
    "service.api_worker": "API worker",
    "-m service": "API",
}
SUM = "all together"
FIGURES = ("rss_mb", "pss_mb", "uss_mb", "cpu_s", "idle_cpu_s", "seconds")


@dataclass(frozen=True)
class Program:
    """A checkout to measure."""

    name: str
    folder: Path


@dataclass
class Round:
    """What one start showed: figures by process, and events as (seconds since the start, text)."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    events: list[tuple[float, str]] = field(default_factory=list)


class Watch:
    """Looks at a tree of processes that is starting, and notes what is new."""

    def __init__(self, root: psutil.Process, url: str, *, began: float) -> None:
        self._root, self._url, self._began = root, url, began
        self._seen: set[str] = set()
        self._state = ""
        self.events: list[tuple[float, str]] = []

    def until_ready(self) -> float:
        """Seconds until the service takes requests. Raises `TimeoutError`."""
        while self._state != "ready":
            is_over = self._root.status() == psutil.STATUS_ZOMBIE
            if is_over or time.monotonic() - self._began > START_TIMEOUT_S:
                raise TimeoutError("the service does not become ready")
            for _, role in roles(self._root):
                name = f"{role} begins"
                if name not in self._seen:
                    self._seen.add(name)
                    self._note(name)
            state = asked_for_readiness(self._url)
            if state != self._state:
                self._state = state
                self._note(f"service: {state}")
            time.sleep(POLL_S)
        return time.monotonic() - self._began

    def until_idle(self) -> None:
        """Until the tree hardly computes any more."""
        give_up_at = time.monotonic() + MAX_SETTLE_S
        before = total_cpu_s(self._root)
        while time.monotonic() < give_up_at:
            time.sleep(SETTLE_S)
            now = total_cpu_s(self._root)
            if now - before < IDLE_SHARE * SETTLE_S:
                break
            before = now
        self._note("all processes are idle")

    def _note(self, text: str) -> None:
        self.events.append((time.monotonic() - self._began, text))


def roles(root: psutil.Process) -> Iterator[tuple[psutil.Process, str]]:
    """The processes below `root`, and itself, with what they are; others are left out."""
    for process in (root, *root.children(recursive=True)):
        try:
            command, parent = process.cmdline(), process.parent()
            is_fork = parent is not None and parent.cmdline() == command
        except psutil.Error:  # it has just ended
            continue
        line = " ".join(command)
        role = next((role for part, role in ROLES.items() if part in line), None)
        if role is not None and "child_process.py" not in line:
            yield process, f"{role}'s twin" if is_fork else role


def cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def total_cpu_s(root: psutil.Process) -> float:
    return sum(cpu_s(process) for process, _ in roles(root))


def asked_for_readiness(url: str) -> str:
    """What the service says of itself: "no answer", what is down, or "ready"."""
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
            return "ready"
    except urllib.error.HTTPError as error:
        with error:
            down = json.load(error).get("down", {})
        return "; ".join(f"{part} {what}" for part, what in down.items()) or f"status {error.code}"
    except OSError:
        return "no answer"


def measure(program: Program, arguments: argparse.Namespace) -> Round:
    """Start it, wait, measure, stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TESSERA_")}
    with TemporaryDirectory(prefix="tessera-bench-") as folder, (Path(folder) / "log").open("wb") as log:
        own = {
            "PYTHONPATH": str(program.folder),
            "PYTHONSAFEPATH": "1",  # or the current folder, which is this checkout, would come before it
            "TESSERA_DATA_DIR": folder,
            "TESSERA_SERVICE_PORT": str(port),
            "TESSERA_SERVICE_WORKERS": str(arguments.workers),
            "TESSERA_WORKER_METRICS_PORT": "0",
        }
        if arguments.model is not None:
            own["TESSERA_BASE_MODEL"] = arguments.model
        began = time.monotonic()
        process = start_child(
            [sys.executable, "-m", "service.local"], environment={**inherited, **own}, output=log
        )
        try:
            root = psutil.Process(process.pid)
            watch = Watch(root, f"http://127.0.0.1:{port}", began=began)
            seconds = watch.until_ready()
            cpu_until_ready = {pid.pid: cpu_s(pid) for pid, _ in roles(root)}
            watch.until_idle()
            return Round(figures(root, cpu_until_ready, seconds), watch.events)
        except TimeoutError:
            print((Path(folder) / "log").read_text(errors="replace")[-4000:])
            raise
        finally:
            process.terminate()
            process.wait()


def figures(
    root: psutil.Process, cpu_until_ready: dict[int, float], seconds: float
) -> dict[str, dict[str, float]]:
    """By process, and their sum."""
    rows: dict[str, dict[str, float]] = {}
    for process, role in roles(root):
        memory = process.memory_full_info()
        found = {
            "rss_mb": memory.rss / MB,
            "pss_mb": memory.pss / MB,
            "uss_mb": memory.uss / MB,
            "cpu_s": cpu_until_ready.get(process.pid, 0.0),
            "idle_cpu_s": cpu_s(process),
        }
        row = rows.setdefault(role, dict.fromkeys(found, 0.0))
        for name, value in found.items():
            row[name] += value
    total = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
    return {**rows, SUM: {**total, "seconds": seconds}}


def medians(program: Program, rounds: list[Round]) -> list[dict[str, Any]]:
    """One row per process."""
    names = dict.fromkeys(name for one in rounds for name in one.rows)
    names[SUM] = names.pop(SUM)  # the last
    rows = []
    for name in names:
        found = [one.rows[name] for one in rounds if name in one.rows]
        shown = {key: round(statistics.median(row[key] for row in found), 2) for key in found[0]}
        rows.append({"program": program.name, "process": name, **shown})
    return rows


def ratios(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict[str, Any]:
    """What all processes take now, as a part of what they took before."""
    mine, theirs = now[-1], before[-1]
    shown = {key: round(mine[key] / theirs[key], 3) for key in FIGURES}
    return {"program": f"{mine['program']} / {theirs['program']}", "process": SUM, **shown}


@contextmanager
def checked_out(commit: str) -> Iterator[Program]:
    """Another commit in a worktree of its own, which is gone afterwards."""
    git = ("git", "-C", str(ROOT))
    with TemporaryDirectory(prefix="tessera-bench-") as parent:
        folder = Path(parent) / "program"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(folder), commit], check=True)
        try:
            yield Program(described(folder), folder)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def described(folder: Path) -> str:
    """The commit of a checkout; with a plus if its files differ from it."""
    git = ("git", "-C", str(folder))
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    return f"{commit}+" if changed else commit


def run(programs: list[Program], arguments: argparse.Namespace) -> list[list[Round]]:
    """The rounds of each program, in turn; one before them, for files that are not compiled or cached yet,
    is not counted."""
    found: list[list[Round]] = [[] for _ in programs]
    for index in range(arguments.rounds + 1):
        for rounds, program in zip(found, programs, strict=True):
            one = measure(program, arguments)
            if index > 0:
                rounds.append(one)
            shown = {name: round(value, 1) for name, value in one.rows[SUM].items()}
            print(f"{'not counted' if index == 0 else f'round {index}'}: {program.name} {shown}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--workers", type=int, default=1, help="API processes")
    parser.add_argument("--model", help="another base model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    mine = Program(described(ROOT), ROOT)
    if arguments.against is None:
        [rounds] = run([mine], arguments)
        rows = medians(mine, rounds)
    else:
        with checked_out(arguments.against) as other:
            theirs, rounds = run([other, mine], arguments)
        before, now = medians(other, theirs), medians(mine, rounds)
        rows = [*before, *now, ratios(now, before)]
    print_table(rows)
    print(f"\nthe last start of {mine.name}, in seconds:")
    for at, text in sorted(rounds[-1].events):
        print(f"{at:8.2f}  {text}")
    events = [
        {"program": mine.name, "seconds": round(at, 2), "event": text}
        for at, text in sorted(rounds[-1].events)
    ]
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments), rows=[*rows, *events])


if __name__ == "__main__":
    main()
