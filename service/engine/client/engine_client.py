"""The engine for the process that owns it: a connection, and the engine process that is kept alive behind it.

The process is started, watched, and started again when it dies, hangs or breaks the protocol. Its death fails
the requests in flight (`EngineUnavailable`), but never the API. Knows nothing of HTTP, text or the content of
the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from service.engine.client.connection import EngineConnection
from service.engine.client.engine_child import (
    COMMAND,
    FIRST_RESTART_DELAY_S,
    MAX_RESTART_DELAY_S,
    STABLE_S,
    EngineChild,
    Heartbeat,
    child_environment,
    socket_path,
)
from service.engine.settings import EngineSettings
from service.engine.wire import ipc
from service.engine.wire.messages import EngineInfo
from tessera.errors import EngineUnavailable
from tessera.processes.restarts import RestartDelay
from tessera.settings import CommonSettings

logger = logging.getLogger(__name__)

#: How long the engine may be silent before its first message: importing torch on a busy machine takes tens of
#: seconds. From then on it sends one per second, also while it loads a model or waits for the store.
START_TIMEOUT_S = 180.0


class EngineClient(EngineConnection):
    """Owns the engine process between `start` and `close`, which must run in one event loop.

    command: starts the engine. socket: where all engine processes listen, one after another, so that other
    API processes find them; None takes a new path for each.
    """

    def __init__(
        self,
        settings: CommonSettings,
        store_url: str,
        *,
        engine_settings: EngineSettings | None = None,
        command: Sequence[str] = COMMAND,
        socket: Path | None = None,
    ) -> None:
        engine_settings = engine_settings or EngineSettings()
        super().__init__(
            Heartbeat(START_TIMEOUT_S),
            heartbeat_timeout_s=engine_settings.heartbeat_timeout_s,
            max_stalled_s=engine_settings.heartbeat_timeout_s,
        )
        #: Number of processes that were started after the first.
        self.restarts_total = 0
        self._socket = socket
        self._data_dir = settings.data_dir
        self._command = command
        self._environment = child_environment(settings, engine_settings, store_url)
        self._restart_delay = RestartDelay(
            first_s=FIRST_RESTART_DELAY_S, max_s=MAX_RESTART_DELAY_S, stable_s=STABLE_S
        )
        self._ready_at: float | None = None
        self._supervision: asyncio.Task[None] | None = None
        #: Started before `start`, if `start_process` was called.
        self._first_child: EngineChild | None = None

    def start_process(self) -> None:
        """Start the first engine process now, before there is an event loop, so that both processes load at
        the same time. It ends with the calling thread; `start` supervises it. If it cannot be started,
        `start` tries again and reports why."""
        with contextlib.suppress(OSError, EngineUnavailable):
            self._first_child = self._start_child()

    async def start(self) -> None:
        """Start to keep an engine process alive. Returns at once; see `wait_ready`."""
        assert self._supervision is None, "started twice"
        self.starting_error = "the engine process is being started"
        self._supervision = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """End the engine process. Requests in flight raise `EngineUnavailable`, and no process is left
        behind."""
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
            self._supervision = None

    async def _supervise(self) -> None:
        while True:
            self._ready_at = None
            reason = await self._run_child()
            served_s = 0.0 if self._ready_at is None else time.monotonic() - self._ready_at
            delay_s = self._restart_delay.after(served_s)
            logger.error("%s; the next engine process starts in %.1f s", reason, delay_s)
            await asyncio.sleep(delay_s)
            self.restarts_total += 1

    def _start_child(self) -> EngineChild:
        """Start an engine process at its socket. Raises `OSError`, `EngineUnavailable`."""
        child = EngineChild(self._command, self._environment, self._socket or socket_path(self._data_dir))
        child.start(restarts=self.restarts_total)
        return child

    async def _run_child(self) -> str:
        """Start one engine process and watch it until it has ended. Return why it ended."""
        try:
            child, self._first_child = self._first_child or self._start_child(), None
        except (OSError, EngineUnavailable) as error:
            self.starting_error = f"the engine process cannot be started: {error}"
            return self.starting_error
        logger.info("engine process %d started", child.pid)
        reason, kill = "the engine is being closed", False
        try:
            reason, kill = await self._watch(child)
        except (ipc.FrameError, EngineUnavailable) as error:
            reason, kill = str(error), True
        except Exception as error:  # whatever happens, it must not end the supervision
            logger.exception("watching engine process %d failed", child.pid)
            reason, kill = f"watching the engine process failed: {error!r}", True
        finally:
            self.disconnect(reason)
            await child.end(kill=kill)
        return reason

    async def _watch(self, child: EngineChild) -> tuple[str, bool]:
        """Talk to the process until it ends or must be ended. Return the reason, and whether to kill it."""
        self.failure = None
        self._heartbeat.timeout_s = START_TIMEOUT_S
        exited = asyncio.create_task(child.wait_for_exit())
        silent = asyncio.create_task(self.wait_until_silent(lambda: child.pid))
        talk = asyncio.create_task(self.talk(child.socket))
        tasks = (exited, silent, talk)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not exited.cancelled():
            ending = f"the engine process ended with status {exited.result()}"
            return f"{ending}: {self.failure}" if self.failure else ending, False
        if not talk.cancelled():
            talk.result()  # raises, because the process breaks the protocol or is stuck
        return f"the engine process has been silent for {self._heartbeat.timeout_s:g} s", True

    def _on_ready(self, info: EngineInfo) -> None:
        super()._on_ready(info)
        self._ready_at = self._ready_at or time.monotonic()
