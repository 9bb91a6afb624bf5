"""The benchmark of the footprint: which process is which, and how rounds become rows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

from benchmarks.processes.footprint import SUM, Program, Round, medians, ratios, roles
from tessera.processes.child_process import start_child
from tests.waiting import HANG_S, wait_until

SLEEPER = "import time; time.sleep(600)"


def round_of(rss_mb: float, seconds: float) -> Round:
    figures = {"rss_mb": rss_mb, "pss_mb": 1.0, "uss_mb": 1.0, "cpu_s": 2.0, "idle_cpu_s": 2.0}
    return Round({"engine": figures, SUM: {**figures, "seconds": seconds}})


def test_rows_are_medians_and_the_last_one_is_compared() -> None:
    now = medians(Program("new", Path()), [round_of(30.0, 5.0), round_of(10.0, 4.0), round_of(20.0, 6.0)])
    before = medians(Program("old", Path()), [round_of(40.0, 10.0)])
    assert [row["process"] for row in now] == ["engine", SUM]
    assert (now[-1]["rss_mb"], now[-1]["seconds"]) == (20.0, 5.0)
    assert ratios(now, before) == {
        "program": "new / old", "process": SUM, "rss_mb": 0.5, "pss_mb": 1.0, "uss_mb": 1.0, "cpu_s": 1.0,
        "idle_cpu_s": 1.0, "seconds": 0.5,
    }  # fmt: skip


async def test_processes_are_told_by_their_command_lines() -> None:
    names = ("service.engine", "trainer_worker", "something else")
    children = [start_child([sys.executable, "-c", SLEEPER, name]) for name in names]
    try:
        own = psutil.Process(os.getpid())

        def found() -> bool:
            mine = {child.pid for child in children}
            return [role for p, role in roles(own) if p.pid in mine] == ["engine", "trainer"]

        await wait_until(found, HANG_S)
    finally:
        for child in children:
            child.kill()
            child.wait()
