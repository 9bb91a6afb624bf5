"""Real servers for tests, which end with the test process even if that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_core import store_process
from adapter_core.store_binary import find_binary


@contextmanager
def run_server(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Valkey or Redis server in `folder`, without persistence unless the options ask for it.

    Yields at once: wait until it answers.
    """
    launcher = [sys.executable, "-I", "-S", store_process.__file__, str(os.getpid()), str(folder / "lock")]
    command = [str(find_binary()), "--dir", str(folder), "--save", "", "--loglevel", "warning", *options]
    with (folder / "server.log").open("wb") as output:
        server = subprocess.Popen([*launcher, *command], stdout=output, stderr=output)
    try:
        yield server
    finally:
        server.kill()
        server.wait()
