"""What a session may be told while it works, and how its work makes way. Knows no job and no tensor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from enum import IntEnum
from typing import Any, TypeVar

from tessera.errors import Unavailable
from tessera.queue.leases import LeaseState

T = TypeVar("T")

#: Between two attempts to reach the store.
FIRST_RETRY_S, MAX_RETRY_S = 0.1, 2.0


class Command(IntEnum):
    """Why a session has to stop; of several the highest counts."""

    RELEASE = 1  # the worker ends
    PAUSE = 2
    CANCEL = 3
    LOST = 4


class Stopped(Exception):
    """A command has come."""


class Orders:
    """The commands of one session, and the waits that they interrupt."""

    def __init__(self) -> None:
        self.command: Command | None = None
        self._commanded = asyncio.Event()
        self._wake = asyncio.Event()

    def give(self, command: Command) -> None:
        self.command = max(command, self.command or command)
        self._commanded.set()
        self._wake.set()

    def obey(self, state: LeaseState) -> None:
        """What a renewal or a report said of the lease."""
        if state is not LeaseState.HELD:
            self.give(Command[state.name])

    def wake(self) -> None:
        """There is news for whoever waits in `sleep_until`."""
        self._wake.set()

    async def sleep_until(self, due: float) -> None:
        """Until there is news, or the monotonic clock says so. Raises `Stopped`."""
        try:
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        if self.command is not None:
            raise Stopped

    async def interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Raises `Stopped` on a command, after `work` was cancelled and has ended."""
        task, commanded = asyncio.create_task(work), asyncio.create_task(self._commanded.wait())
        try:
            await asyncio.wait({task, commanded}, return_when=asyncio.FIRST_COMPLETED)
            if self.command is not None:
                raise Stopped
            return await task
        finally:
            task.cancel()
            commanded.cancel()
            await asyncio.gather(task, commanded, return_exceptions=True)


async def until_available(call: Callable[[], Awaitable[T]], note_outage: Callable[[Unavailable], None]) -> T:
    """The result of a call that is repeated as long as the store does not answer."""
    delay_s = FIRST_RETRY_S
    while True:
        try:
            return await call()
        except Unavailable as error:
            note_outage(error)
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, MAX_RETRY_S)
