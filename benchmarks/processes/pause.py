"""Does a pause of the machine, or of one process, cause a restart? An idle `service.local` is stopped.

    python -m benchmarks.processes.pause [--seconds 90] [--workers 1] [--json FILE]

The whole tree, the engine's parent, the engine and the store get SIGSTOP for longer than the engine's
heartbeat and the trainer's lease allow, and then SIGCONT: children first, parents first, or one by one. No
process may be restarted, and the service must answer; otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.report import print_table, save
from service.local import is_ready
from tessera.processes.child_process import start_child

START_TIMEOUT_S = 600.0
#: Seconds to wait after SIGCONT, within which a wrongly noticed silence would cause a restart.
WATCH_S = 12.0


def tree_of(root: psutil.Process) -> list[psutil.Process]:
    """Return all processes of the tree, children before their parents."""
    return [*reversed(root.children(recursive=True)), root]


def find(processes: Sequence[psutil.Process], word: str) -> psutil.Process:
    return next(process for process in processes if word in " ".join(process.cmdline()))


def pause(stopped: Sequence[psutil.Process], seconds: float, *, gap_s: float = 0.0) -> None:
    """Stop the processes, and continue them in the given order."""
    for process in stopped:
        process.suspend()
    try:
        time.sleep(seconds)
    finally:
        for process in stopped:
            process.resume()
            time.sleep(gap_s)


def measure(root: psutil.Process, url: str, seconds: float) -> list[dict[str, Any]]:
    """Return one row per pause, with the number of processes that did not survive it."""
    tree = tree_of(root)
    engine, store = find(tree, "service.engine"), find(tree, "redis.sock")
    parent = psutil.Process(engine.ppid())
    pauses: dict[str, tuple[Sequence[psutil.Process], float]] = {
        "all, children first": (tree, 0.0),
        "all, parents first, a second apart": (tree[::-1], 1.0),
        "the engine's parent": ([parent], 0.0),
        "the engine, idle": ([engine], 0.0),
        "the store": ([store], 0.0),
    }
    rows = []
    for name, (stopped, gap_s) in pauses.items():
        pause(stopped, seconds, gap_s=gap_s)
        time.sleep(WATCH_S)
        lost = [process.pid for process in tree if not process.is_running()]
        rows.append({"stopped": name, "seconds": seconds, "restarts": len(lost), "is_ready": is_ready(url)})
        if lost:
            break
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--workers", type=int, default=1, help="API processes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with TemporaryDirectory(prefix="tessera-bench-") as folder, (Path(folder) / "log").open("wb") as log:
        own = {
            "TESSERA_DATA_DIR": folder,
            "TESSERA_SERVICE_PORT": str(port),
            "TESSERA_SERVICE_WORKERS": str(arguments.workers),
            "TESSERA_WORKER_METRICS_PORT": "0",
        }
        command = [sys.executable, "-m", "service.local"]
        process = start_child(command, environment={**os.environ, **own}, output=log)
        try:
            give_up_at = time.monotonic() + START_TIMEOUT_S
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > give_up_at:
                    print((Path(folder) / "log").read_text()[-4000:])
                    return 1
                time.sleep(0.5)
            time.sleep(WATCH_S)  # until the trainer is up, too
            rows = measure(psutil.Process(process.pid), url, arguments.seconds)
            with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as reply:
                assert reply.status == 200
        finally:
            process.terminate()
            process.wait()
    print_table(rows)
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments), rows=rows)
    return 0 if all(row["is_ready"] and not row["restarts"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
