"""The store when no URL is given: a supervised local Valkey or Redis that ends with its processes.

All processes with one data folder share one server. The process that holds the lock of the folder runs the
server and restarts it if it dies. The others attach to it, and one of them takes over when the holder ends.
The server speaks the Redis protocol over a unix socket, keeps an appendonly file and never evicts. This
module knows nothing of what is stored.

    <data_dir>/store/  lock         locked (flock) by the process that supervises
server.lock  locked by the server itself, so that two servers never write one appendonly file
                       server.log   output of the server
                       redis.sock   (under the system's temporary folder if the path is too long for a socket)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from tessera.errors import StoreUnavailable
from tessera.processes.child_process import start_child
from tessera.processes.restarts import RestartDelay
from tessera.redis.binary import find_binary

if TYPE_CHECKING:
    from tessera.settings import CommonSettings

log = logging.getLogger(__name__)

#: `sun_path` holds 108 bytes on Linux, 104 on macOS.
MAX_SOCKET_PATH_BYTES = 100
#: Seconds between two checks, by a process without the lock, whether the holder has ended.
TAKEOVER_POLL_S = 0.1
#: Seconds before the server is started again. The delay doubles (50, 100, 200 … ms) while the server does not
#: run for long, whatever ended it.
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 5.0
#: A server that ran for longer than this counts as started.
_STARTED_S = 5.0
#: Seconds between two checks whether the server answers.
_START_POLL_S = 0.01
#: The most that one check may count towards a time-out. A check that took longer was interrupted, because
#: this process was paused.
_MAX_CHECK_S = 2.0
#: `start` gives up when this many servers in a row have ended at once, because then the data or the machine
#: is at fault.
_MAX_FAILED_STARTS = 3
_STOP_TIMEOUT_S = 15.0

#: With appendfsync always, an acknowledged write survives a kill -9 of the server and a power cut. Measured
#: on a virtual disk with one writer of 28 KB records: SET takes 0.37 ms at p50 (0.10 with everysec), a GET
#: beside it 0.33 ms (0.12). everysec holds writes back while a sync runs, and a kill then loses them.
#: rdbcompression is off because it takes 23 s instead of 5 s for 2 GB, and floats do not shrink.
_SERVER_OPTIONS = (
    "--port", "0",
    "--unixsocketperm", "700",
    "--daemonize", "no",
    "--appendonly", "yes",
    "--appendfsync", "always",
    "--save", "",
    "--rdbcompression", "no",
    "--maxmemory-policy", "noeviction",
    "--loglevel", "warning",
)  # fmt: skip


class EmbeddedStore:
    """A local server for one data folder, run by this process or by another one that uses the folder.

    binary: the server program to run instead of the one that `find_binary` chooses.
    """

    def __init__(self, data_dir: Path, *, binary: str | None = None) -> None:
        self._folder = data_dir.resolve() / "store"
        self._binary = binary
        self._socket = socket_path(self._folder)
        self._lock: int | None = None  # descriptor of the locked file while this process is the holder
        self._server: subprocess.Popen[bytes] | None = None
        self._server_guard = threading.Lock()  # between a spawn and `stop`
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failed_starts = 0
        self._restart_delay = _restart_delay()
        self._failure: StoreUnavailable | None = None

    def start(self, *, timeout_s: float = 60.0) -> str:
        """Run the server or attach to it, and return its unix:// URL once it answers.

        Raises `StoreUnavailable` if there is no server program, or if it does not answer within timeout_s.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._thread is None:
            self._stopping.clear()
            self._failed_starts, self._failure = 0, None
            self._restart_delay = _restart_delay()
            self._thread = threading.Thread(target=self._supervise, name="embedded-store", daemon=True)
            self._thread.start()
        waited_s, checked_at = 0.0, time.monotonic()
        while not answers(self._socket):
            failure = self._failure
            previous, checked_at = checked_at, time.monotonic()
            waited_s += min(checked_at - previous, _MAX_CHECK_S)
            if failure is None and waited_s > timeout_s:
                failure = StoreUnavailable(f"the embedded store did not answer within {timeout_s:g} s")
            if failure is not None:
                self.stop()
                raise StoreUnavailable(failure.message + self._log_tail()) from failure.__cause__
            time.sleep(_START_POLL_S)
        return f"unix://{quote(str(self._socket))}"

    def stop(self) -> None:
        """Detach from the server, and end it if this process runs it.

        Another attached process then takes over.
        """
        self._stopping.set()
        if self._thread is None:
            return
        with self._server_guard:
            if self._server is not None:
                self._server.terminate()  # the server writes its appendonly file before it ends
        self._thread.join(_STOP_TIMEOUT_S)
        if self._thread.is_alive() and self._server is not None:
            self._server.kill()
        self._thread.join()
        self._thread = None

    def server_pid(self) -> int | None:
        """Return the process id of the server if this process runs it."""
        server = self._server
        return server.pid if server is not None and server.poll() is None else None

    def _supervise(self) -> None:
        # The kernel ends the server with the thread that started it, so one thread starts every server, and
        # lives as long as this process.
        while not self._stopping.is_set():
            try:
                if not self._try_lock():
                    self._stopping.wait(TAKEOVER_POLL_S)
                    continue
                started = time.monotonic()
                status = self._run_server()
                lived_s = time.monotonic() - started
                self._note_end(status, lived_s=lived_s)
            except (OSError, StoreUnavailable) as error:
                lived_s = 0.0
                self._failure = _as_unavailable(error)
                self._failed_starts += 1
                log.error("%s", self._failure)
            self._stopping.wait(self._restart_delay.after(lived_s))
        if self._lock is not None:
            os.close(self._lock)  # releases the lock
            self._lock = None

    def _note_end(self, status: int, *, lived_s: float) -> None:
        """Count a server that ended at once. status: its exit status, negative if a signal ended it."""
        if self._stopping.is_set():
            return
        log.warning("the server of the embedded store ended with status %d; starting it again", status)
        self._failed_starts = self._failed_starts + 1 if status > 0 and lived_s < _STARTED_S else 0
        if self._failed_starts >= _MAX_FAILED_STARTS:
            message = f"the server of the embedded store does not start (status {status})"
            self._failure = StoreUnavailable(message)

    def _try_lock(self) -> bool:
        """Take the lock of the folder unless another process holds it.

        Return whether this process holds it.
        """
        if self._lock is not None:
            return True
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    def _run_server(self) -> int:
        """Start the server, wait until it ends, and return its exit status."""
        self._failure = None
        binary = find_binary(self._binary)
        if self._server is None and answers(self._socket):
            # Left over from a parent that was killed, on a system without PR_SET_PDEATHSIG.
            _shut_down(self._socket)
        paths = ["--dir", str(self._folder), "--unixsocket", str(self._socket)]
        with (self._folder / "server.log").open("ab") as output, self._server_guard:
            if self._stopping.is_set():
                return 0
            self._server = start_child(
                [str(binary), *_SERVER_OPTIONS, *paths],
                output=output,
                lock_file=self._folder / "server.lock",
            )
        return self._server.wait()

    def _log_tail(self) -> str:
        try:
            text = (self._folder / "server.log").read_text(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip() and "WARNING" not in line][-3:]
        return f"; its log ends: {' | '.join(lines)}" if lines else ""


def store_url(settings: CommonSettings) -> tuple[str, EmbeddedStore | None]:
    """Return the URL of the configured store; or start an embedded one, which the caller must stop.

    Raises `StoreUnavailable` if the embedded store does not start.
    """
    url = settings.store_url_with_password()
    if url is not None:
        return url, None
    store = EmbeddedStore(settings.data_dir)
    return store.start(), store


def socket_path(folder: Path) -> Path:
    """Return the socket of the server of a store folder: in that folder, or in a short private folder."""
    direct = folder / "redis.sock"
    if len(os.fsencode(direct)) <= MAX_SOCKET_PATH_BYTES:
        return direct
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"tessera-{os.getuid()}-{name}"
    short.mkdir(mode=0o700, exist_ok=True)
    status = short.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or short.is_symlink():
        raise StoreUnavailable(f"{short} belongs to another user or is open to others; remove it")
    return short / "redis.sock"


def answers(path: Path) -> bool:
    """Return whether a server listens and has loaded its data."""
    return _inline_command(path, b"PING\r\n").startswith(b"+PONG")


def _restart_delay() -> RestartDelay:
    return RestartDelay(first_s=_FIRST_BACKOFF_S, max_s=_MAX_BACKOFF_S, stable_s=_STARTED_S)


def _shut_down(path: Path) -> None:
    log.warning("ending the server at %s, which has no parent process any more", path)
    _inline_command(path, b"SHUTDOWN NOSAVE\r\n")


def _inline_command(path: Path, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.settimeout(1.0)
        client.connect(str(path))
        client.sendall(command)
        return client.recv(1024)
    return b""


def _as_unavailable(error: OSError | StoreUnavailable) -> StoreUnavailable:
    if isinstance(error, StoreUnavailable):
        return error
    failure = StoreUnavailable(f"the server of the embedded store cannot be started: {error}")
    failure.__cause__ = error
    return failure
