"""A whole Tessera on loopback: the real store, service, engine and worker, as `make serve` starts them."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import redis

from service.local import is_ready
from tessera.processes.child_process import start_child
from tessera.redis.embedded import socket_path
from tests.waiting import HANG_S, wait_until_sync

DATA = Path(__file__).parents[2] / "examples" / "data"


class Stack:
    """A running stack and its processes."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        """settings: more variables of the environment."""
        self.data_dir = data_dir
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = data_dir / "stack.log"
        environment = {
            **os.environ,
            "TESSERA_DATA_DIR": str(data_dir),
            "TESSERA_SERVICE_PORT": str(self.port),
            "TESSERA_WORKER_METRICS_PORT": "0",
            "TESSERA_WORKER_LEASE_S": "6",
            "TESSERA_WORKER_CHECKPOINT_EVERY_S": "1",
            **settings,
        }
        with self.log_path.open("wb") as log:
            command = [sys.executable, "-m", "service.local"]
            self.process = start_child(command, environment=environment, output=log)
        wait_until_sync(self.has_started)

    def has_started(self) -> bool:
        assert self.process.poll() is None, self.log_path.read_text()[-4000:]
        return is_ready(self.url)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def store(self) -> redis.Redis:
        """A client of the embedded store, to look at it or to damage it."""
        return redis.Redis(unix_socket_path=str(socket_path(self.data_dir.resolve() / "store")))

    def find(self, *words: str) -> psutil.Process:
        """The descendant whose command line holds one of `words`."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                command = process.cmdline()  # empty for a zombie
            except psutil.Error:
                continue
            if any(word in part for word in words for part in command):
                return process
        raise LookupError(f"no process with {words}; log: {self.log_path.read_text()[-2000:]}")

    def kill(self, *words: str) -> int:
        """kill -9 of one part; returns the pid that was killed."""
        process = self.find(*words)
        process.send_signal(signal.SIGKILL)
        process.wait(HANG_S)
        return process.pid

    def stop(self) -> None:
        processes = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        self.process.wait(HANG_S)
        _, alive = psutil.wait_procs(processes, timeout=HANG_S)
        assert not alive, f"left behind: {[p.cmdline() for p in alive]}"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("stack"))
    yield running
    running.stop()


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with stack.client as client:
        yield client
