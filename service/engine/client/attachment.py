"""The engine for an API process that does not own it: found at its socket, lost and found again.

Whoever started the engine process watches it and starts it again, at the same socket. Here its death is a
connection that is cut: requests in flight raise `EngineUnavailable`, and the next engine is connected to as
soon as it listens.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from service.engine.client.connection import CONNECT_POLL_S, EngineConnection
from service.engine.client.supervisor import Heartbeat
from service.engine.wire import ipc
from service.engine.wire.messages import EngineInfo

logger = logging.getLogger(__name__)


class AttachedEngine(EngineConnection):
    """The engine behind `socket`. `start` and `close` frame the connection, in one event loop.

    restarts_total: of the engine process, by its own word, so that every API process tells the same.
    """

    def __init__(self, socket: Path, *, heartbeat_timeout_s: float) -> None:
        super().__init__(Heartbeat(heartbeat_timeout_s), heartbeat_timeout_s=heartbeat_timeout_s)
        self.restarts_total = 0
        self._socket = socket
        self._talking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look for the engine. Returns at once; see `wait_ready`."""
        assert self._talking is None, "started twice"
        self.starting_error = "the engine has not been found yet"
        self._talking = asyncio.create_task(self._keep_talking())

    async def close(self) -> None:
        """Hang up: the engine cancels what is in flight here."""
        if self._talking is not None:
            self._talking.cancel()
            await asyncio.gather(self._talking, return_exceptions=True)
            self._talking = None
        self.disconnect("the connection to the engine is closed")

    async def _keep_talking(self) -> None:
        while True:
            reason = await self._talk_until_lost()
            logger.warning("%s; looking for the engine again", reason)
            self.disconnect(reason)
            await asyncio.sleep(CONNECT_POLL_S)

    async def _talk_until_lost(self) -> str:
        """Talk until the engine is silent for too long or speaks nonsense; returns which."""
        talk = asyncio.create_task(self.talk(self._socket))
        silent = asyncio.create_task(self.silent(self._engine_pid))
        try:
            await asyncio.wait((talk, silent), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (talk, silent):
                task.cancel()
            await asyncio.gather(talk, silent, return_exceptions=True)
        if talk.cancelled():
            return f"the engine has been silent for {self._heartbeat.timeout_s:g} s"
        error = talk.exception()
        if error is not None and not isinstance(error, ipc.FrameError | OSError):
            logger.error("talking to the engine failed", exc_info=error)
        return str(error)

    def _engine_pid(self) -> int | None:
        return self._info.pid if self._info is not None else None

    def _on_ready(self, info: EngineInfo) -> None:
        super()._on_ready(info)
        self.restarts_total = info.restarts
