"""The engine process as a child: its socket and environment, its start and end, and a watch for its silence.

`engine_client.py` supervises it. Knows nothing of the messages on the socket.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import psutil

from service.engine.settings import EngineSettings, to_environment
from tessera.errors import EngineUnavailable
from tessera.processes.awake import RunnableTime
from tessera.processes.child_process import start_child
from tessera.settings import PREFIX, CommonSettings

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "service.engine")

#: `sun_path` holds 108 bytes on Linux, 104 on macOS.
MAX_SOCKET_PATH_BYTES = 100
#: The end of the connection usually reveals the death of the process; this finds it without a connection.
EXIT_POLL_S = 0.1
#: Seconds from SIGTERM to SIGKILL. The process itself gives a running step 3 s.
END_TIMEOUT_S = 5.0
FIRST_RESTART_DELAY_S, MAX_RESTART_DELAY_S = 0.2, 10.0
#: A process that was ready for this long did not fail at its start, so the next one is started without delay.
STABLE_S = 60.0
#: Seconds between two checks. Silence is counted in checks, not measured by the clock: a pause of the whole
#: API process (a suspended machine) counts as one check, however long it was.
CHECK_INTERVAL_S = 0.25
#: An engine that was silent for too long gets a ping before it is replaced, and this many seconds to answer:
#: after a pause its first message may need a moment.
ANSWER_S = 1.0
#: Bytes that are page-locked when the engine is built. A larger host cache is page-locked adapter by adapter.
MAX_RESERVED_BYTES = 2**30
#: The variables from which torch reads the settings of its allocator, newest name first: the first that is
#: set counts.
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_RESERVE = "pinned_reserve_segment_size_mb"


class EngineChild:
    """One engine process."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], socket: Path) -> None:
        self.socket = socket
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, restarts: int = 0) -> None:
        """Start the process. It dies with the calling *thread*, so that thread must live on.

        restarts: number of earlier processes, which it reports.
        """
        arguments = ["--socket", str(self.socket), "--parent", str(os.getpid()), "--restarts", str(restarts)]
        self._process = start_child([*self._command, *arguments], environment=self._environment)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def wait_for_exit(self) -> int:
        """Wait for the end of the process. Return its exit status, negative if a signal ended it."""
        assert self._process is not None
        while (status := self._process.poll()) is None:  # noqa: ASYNC110 - the only portable way
            await asyncio.sleep(EXIT_POLL_S)
        return status

    async def end(self, *, kill: bool = False) -> None:
        """Send SIGTERM, and SIGKILL after END_TIMEOUT_S, or at once with `kill`. Return when the process has
        ended."""
        if self._process is None:
            return
        try:
            if not kill:
                self._process.terminate()
                async with asyncio.timeout(END_TIMEOUT_S):
                    await self.wait_for_exit()
        except TimeoutError:
            logger.warning("engine process %d does not end and is killed", self._process.pid)
        finally:
            self._process.kill()
        await self.wait_for_exit()
        self.socket.unlink(missing_ok=True)


class Heartbeat:
    """Notices that an engine is silent. `timeout_s` may be changed at any time. sleep: waits between
    checks."""

    def __init__(
        self, timeout_s: float, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self.timeout_s = timeout_s
        self._sleep = sleep
        #: Number of messages so far, which their reader increases.
        self.num_beats = 0

    async def wait_until_missed(
        self, *, pid: Callable[[], int | None], is_idle: Callable[[], bool], ask: Callable[[], None]
    ) -> None:
        """Return once there has been no beat for `timeout_s`, and none for ANSWER_S after `ask` was called.

        pid: process id of the engine, if it is known. is_idle: whether no request waits for the engine. Only
        time in which both sides could run counts. An idle engine that was stopped (SIGSTOP) is left alone
        until it continues.
        """
        seen, silent_s, is_asked = self.num_beats, 0.0, False
        runnable = RunnableTime(pid())
        while True:
            await self._sleep(CHECK_INTERVAL_S)
            if runnable.pid != pid():
                runnable = RunnableTime(pid())
            if seen != self.num_beats:
                seen, silent_s, is_asked = self.num_beats, 0.0, False
                continue
            silent_s += runnable.since_last_look_s(CHECK_INTERVAL_S, may_be_stopped=is_idle())
            if silent_s < self.timeout_s:
                continue
            if is_asked:
                return
            is_asked, silent_s = True, self.timeout_s - ANSWER_S
            ask()


def child_environment(
    settings: CommonSettings, engine_settings: EngineSettings, store_url: str
) -> dict[str, str]:
    """Return the environment of this process with the engine's settings, and without those of other
    processes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    inherited |= _reserve_pinned(inherited, engine_settings.host_cache_bytes)
    own = to_environment([settings, engine_settings])
    own.pop("TESSERA_STORE_PASSWORD_FILE", None)  # store_url has the password by now
    return {**inherited, **own, "TESSERA_STORE_URL": store_url}


def _reserve_pinned(environment: Mapping[str, str], host_cache_bytes: int) -> dict[str, str]:
    """Return the setting that makes torch page-lock the host cache at once, not adapter by adapter: without
    it 300 adapters of 115 kB took 23 ms, the slowest 1.8 ms; with it 0.6 ms, the slowest 0.03 ms (H200)."""
    name = next((name for name in _ALLOCATOR_SETTINGS if name in environment), _ALLOCATOR_SETTINGS[0])
    chosen = environment.get(name, "")
    if _RESERVE in chosen or host_cache_bytes == 0:
        return {}
    megabytes = -(-min(host_cache_bytes, MAX_RESERVED_BYTES) // 2**20)
    return {name: ",".join(filter(None, [chosen, f"{_RESERVE}:{megabytes}"]))}


def socket_path(data_dir: Path) -> Path:
    """Return a new path for the engine's socket, in a private folder. Removes sockets of dead parents there.

    The path is `<data_dir>/run/engine-<pid>-<random>.sock`, or a shorter one under the system's temporary
    folder if that is too long for a socket. Raises `EngineUnavailable` if the folder is open to other users.
    """
    folder = data_dir.resolve() / "run"
    name = f"engine-{os.getpid()}-{secrets.token_hex(3)}.sock"
    if len(os.fsencode(folder / name)) > MAX_SOCKET_PATH_BYTES:
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"tessera-run-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EngineUnavailable(f"{folder} belongs to someone else or is open to others; remove it")
    for stale in folder.glob("engine-*.sock"):
        pid = stale.name.split("-")[1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            stale.unlink(missing_ok=True)
    return folder / name
