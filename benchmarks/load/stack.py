"""A running service with its store and engine, as an operator starts it, on loopback ports of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tessera.processes.child_process import start_child
from tessera.redis.embedded import socket_path

START_TIMEOUT_S = 600.0  # a large model is read from disk
STOP_TIMEOUT_S = 600.0  # reached only by a fault: the service gives its parts 35 s


class ServiceStack:
    """`python -m service` and its children. environment: further TESSERA_ variables."""

    def __init__(self, data_dir: Path, environment: Mapping[str, str]) -> None:
        self.data_dir = data_dir
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = (data_dir / "service.log").open("wb")
        own = {"TESSERA_DATA_DIR": str(data_dir), "TESSERA_SERVICE_PORT": str(self.port)}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TESSERA_")}
        self.process = start_child(
            [sys.executable, "-m", "service"],
            environment={**inherited, "TESSERA_LOG_LEVEL": "WARNING", **environment, **own},
            output=self._log,
        )

    @property
    def store_url(self) -> str:
        return f"unix://{socket_path(self.data_dir.resolve() / 'store')}"

    @property
    def engine_socket(self) -> Path:
        """The socket at which the engine listens now."""
        found = (self.data_dir / "run").glob("engine-*.sock")
        return max(found, key=lambda path: path.stat().st_mtime)

    def wait_ready(self) -> None:
        """Wait until the service is ready. Raises `RuntimeError` with the end of its log if that fails."""
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"the service is not ready:\n{self.log_tail()}")
            time.sleep(0.2)

    def log_tail(self) -> str:
        return (self.data_dir / "service.log").read_text(errors="replace")[-4000:]

    def resident_bytes(self) -> dict[str, int]:
        """Resident memory by process: parent, engine, API workers together, store."""
        sums: dict[str, int] = {}
        for process in (parent := psutil.Process(self.process.pid), *parent.children(recursive=True)):
            try:
                command, resident = " ".join(process.cmdline()), process.memory_info().rss
            except psutil.Error:  # it has just ended
                continue
            kinds = {"service.engine": "engine", "service.api_worker": "api", "-server": "store"}
            kind = next((kind for word, kind in kinds.items() if word in command), "service")
            sums[kind] = sums.get(kind, 0) + int(resident)
        return sums

    def base_name(self, *, key: str | None = None) -> str:
        """What the base model is called in requests. key: the API key, if the service asks for one."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{self.url}/v1/models", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return str(json.load(reply)["data"][0]["id"])

    def metrics(self) -> dict[str, float]:
        """The service's figures: sample with its labels as it is scraped → value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def running_stack(environment: Mapping[str, str]) -> Iterator[ServiceStack]:
    """A stack that is ready, with a store of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        stack = ServiceStack(Path(folder), environment)
        try:
            stack.wait_ready()
            yield stack
        finally:
            stack.stop()
