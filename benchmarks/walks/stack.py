"""A whole service of some checkout, in processes that record what they enter. Knows nothing of its modules'
names but `service.local`, so that it runs older checkouts too."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.walks.counting import Entry, Recording
from benchmarks.walks.recorder.sitecustomize import ROLE_NAMES
from tessera.processes.child_process import start_child

RECORDER = Path(__file__).parent / "recorder"
START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


class RecordingStack:
    """`python -m service.local` from `root`, with the bundled model and a store of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._folder = folder
        self._control = folder / "control"
        self._control.write_bytes(bytes(len(ROLE_NAMES)))
        self._changes: list[tuple[float, bytes]] = []
        self._log = folder / "log"
        (folder / "records").mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TESSERA_")}
        own = {
            "PYTHONPATH": os.pathsep.join([str(RECORDER), str(root)]),
            "HF_HUB_OFFLINE": "1",
            "WALKS_CONTROL": str(self._control),
            "WALKS_FOLDER": str(folder / "records"),
            "WALKS_ROOT": str(root),
            "TESSERA_DATA_DIR": str(folder / "data"),
            "TESSERA_DEVICE": "cpu",
            "TESSERA_SERVICE_PORT": str(port),
            "TESSERA_WORKER_METRICS_PORT": "0",
        }
        with self._log.open("wb") as log:
            self._process = start_child(
                [sys.executable, "-m", "service.local"],
                environment=inherited | own,
                output=log,
                working_directory=root,
            )

    def wait_ready(self) -> None:
        """Wait until requests are answered. Raises `RuntimeError` with the end of the log if that fails."""
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"the service is not ready:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.5)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path, timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The whole answer, read to its last byte."""
        return self._post(path, json.dumps(body).encode(), "application/json")

    def upload(self, lines: Sequence[str]) -> str:
        """Upload a training file of these lines of JSON; its id."""
        boundary = "walks"
        parts = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n',
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="walk.jsonl"\r\n\r\n',
            "\n".join(lines) + f"\n\r\n--{boundary}--\r\n",
        )
        content_type = f"multipart/form-data; boundary={boundary}"
        return str(json.loads(self._post("/v1/files", "".join(parts).encode(), content_type))["id"])

    def _post(self, path: str, body: bytes, content_type: str) -> bytes:
        request = urllib.request.Request(self._url + path, body, {"content-type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return bytes(reply.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path} is answered with {error.code}: {error.read()[:2000]!r}") from error

    def wait_for_job(self, job_id: str) -> None:
        """Wait until the job has succeeded. Raises `RuntimeError` if it has not."""
        give_up_at = time.monotonic() + JOB_TIMEOUT_S
        while (status := self.get(f"/v1/fine_tuning/jobs/{job_id}")["status"]) != "succeeded":
            if status in ("failed", "cancelled") or time.monotonic() > give_up_at:
                raise RuntimeError(f"the job is {status}:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.1)

    def record(self, number: int, roles: Sequence[str]) -> None:
        """From now on, processes of `roles` record under this number, and the others do not."""
        content = bytes(number if name in roles else 0 for name in ROLE_NAMES)
        with self._control.open("r+b") as file:
            file.write(content)
        self._changes.append((time.monotonic(), content))

    def recordings(self) -> dict[int, Recording]:
        """All recordings by their number. Call it when the stack has stopped: processes write late."""
        entries: dict[int, list[Entry]] = {}
        for entry in read_entries(self._folder / "records"):
            entries.setdefault(entry.recording, []).append(entry)
        seconds: dict[int, dict[str, float]] = {}
        for (started, content), (ended, _) in itertools.pairwise(self._changes):
            for role, number in zip(ROLE_NAMES, content, strict=True):
                if number:
                    times = seconds.setdefault(number, {})
                    times[role] = times.get(role, 0.0) + ended - started
        return {number: Recording(entries[number], seconds[number]) for number in seconds}


def read_entries(folder: Path) -> Iterator[Entry]:
    """What processes have written to `folder`."""
    for path in sorted(folder.iterdir()):
        yield from (Entry(**json.loads(line)) for line in path.read_text().splitlines())


@contextmanager
def recording_stack(root: Path, folder: Path) -> Iterator[RecordingStack]:
    """A stack that is ready, and stopped afterwards. It writes to `folder`."""
    stack = RecordingStack(root, folder)
    try:
        stack.wait_ready()
        yield stack
    finally:
        stack.stop()
