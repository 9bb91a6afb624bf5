"""What tests start ends with the test run, however that ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tessera.processes.child_process import start_child
from tests.waiting import HANG_S, has_ended, wait_until_sync

ROOT = Path(__file__).parents[3]
#: A test that has started a whole service, and hangs.
HANGING = """
import os, sys, threading
from pathlib import Path

from tessera.processes.child_process import start_child

def test_that_hangs():
    folder = Path(__file__).parent
    environment = {**os.environ, "TESSERA_DATA_DIR": str(folder / "data"), "TESSERA_SERVICE_PORT": "0",
                   "TESSERA_WORKER_METRICS_PORT": "0"}
    with (folder / "log").open("wb") as log:
        start_child([sys.executable, "-m", "service.local"], environment=environment, output=log)
    threading.Event().wait()
"""


def end_group(run: subprocess.Popen[bytes], signum: int) -> None:
    os.killpg(run.pid, signum)


def end_first(run: subprocess.Popen[bytes], signum: int) -> None:
    os.kill(run.pid, signum)


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "xdist"])
@pytest.mark.parametrize(
    ("end", "signum"),
    [(end_group, signal.SIGINT), (end_first, signal.SIGTERM), (end_first, signal.SIGKILL)],
    ids=["Ctrl-C", "SIGTERM", "SIGKILL"],
)
def test_an_interrupted_run_leaves_no_process(tmp_path: Path, workers: tuple[str, ...], end, signum) -> None:
    (tmp_path / "test_hanging.py").write_text(HANGING)
    options = ["-p", "no:cacheprovider", "-p", "no:randomly", "-q", "--rootdir", str(tmp_path), *workers]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_hanging.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    run = start_child(command, environment=environment, output=subprocess.DEVNULL)
    try:

        def started() -> list[psutil.Process]:
            """All of it, once the store and both processes of the service run."""
            assert run.poll() is None
            found = psutil.Process(run.pid).children(recursive=True)
            commands = [command_of(process) for process in found]
            parts = ("service.local", "redis.sock", "-m service", "trainer_worker")
            return found if all(any(part in line for line in commands) for part in parts) else []

        processes = wait_until_sync(started)
        end(run, signum)
        run.wait(HANG_S)
        for process in processes:
            wait_until_sync(lambda pid=process.pid: has_ended(pid))
    finally:
        run.kill()
        run.wait()


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ends just now
        return ""


def test_processes_are_started_in_one_way_alone() -> None:
    """`start_child` has the kernel end the child with its parent; `subprocess.run` waits for its child."""
    others = re.compile(r"subprocess\.Popen\(|create_subprocess_(exec|shell)\(|os\.(fork|spawn|posix_spawn)")
    allowed = {
        "tessera/processes/child_process.py",  # start_child itself
        # What they start calls `end_with_parent`.
        "service/processes/twin.py",
        "service/jobs/estimates.py",
        "tests/tessera/redis/test_embedded.py",
        "tests/tessera/queue/test_recovery.py",
        "tests/service/engine/process/engine_parent.py",
        "tests/service/engine/process/test_process_life.py",
    }
    folders = ("tessera", "benchmarks", "examples", "service", "tests", "trainer_worker")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if others.search(path.read_text())}
    assert found - {str(Path(__file__).relative_to(ROOT))} <= allowed
