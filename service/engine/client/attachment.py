"""The engine for an API process that does not own it: found at its socket, and found again when lost.

The process that started the engine watches it and starts it again, at the same socket. Here the death of the
engine is a cut connection: requests in flight raise `EngineUnavailable`, and the next engine is connected as
soon as it listens.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from service.engine.client.connection import CONNECT_POLL_S, EngineConnection
from service.engine.client.engine_child import Heartbeat
from service.engine.wire import ipc
from service.engine.wire.messages import EngineInfo

logger = logging.getLogger(__name__)


class AttachedEngine(EngineConnection):
    """Keeps a connection to the engine behind `socket` between `start` and `close`, in one event loop."""

    def __init__(self, socket: Path, *, heartbeat_timeout_s: float) -> None:
        super().__init__(Heartbeat(heartbeat_timeout_s), heartbeat_timeout_s=heartbeat_timeout_s)
        #: The number that the engine process reports, so that all API processes report the same.
        self.restarts_total = 0
        self._socket = socket
        self._talking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to connect to the engine. Return at once; see `wait_ready`."""
        assert self._talking is None, "started twice"
        self.starting_error = "the engine has not been found yet"
        self._talking = asyncio.create_task(self._keep_talking())

    async def close(self) -> None:
        """Close the connection. The engine cancels the requests in flight here."""
        if self._talking is not None:
            self._talking.cancel()
            await asyncio.gather(self._talking, return_exceptions=True)
            self._talking = None
        self.disconnect("the connection to the engine is closed")

    async def _keep_talking(self) -> None:
        while True:
            reason = await self._talk_until_lost()
            logger.warning("%s; connecting to the engine again", reason)
            self.disconnect(reason)
            await asyncio.sleep(CONNECT_POLL_S)

    async def _talk_until_lost(self) -> str:
        """Talk until the engine is silent for too long or breaks the protocol. Return which of the two."""
        talk = asyncio.create_task(self.talk(self._socket))
        silent = asyncio.create_task(self.wait_until_silent(self._engine_pid))
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
