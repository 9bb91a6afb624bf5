"""The commands that a session receives while it works, and the waits that they interrupt.

Knows no job and no tensor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from enum import IntEnum
from typing import Any, TypeVar

from tessera.queue.leases import LeaseState

T = TypeVar("T")


class Command(IntEnum):
    """Why a session has to stop. If there are several commands, the highest one counts."""

    #: The worker is shutting down: give the job back.
    RELEASE = 1
    #: The owner has paused the job.
    PAUSE = 2
    #: The owner has cancelled the job.
    CANCEL = 3
    #: The lease belongs to another worker or has ended: write nothing any more.
    LOST = 4


class Stopped(Exception):
    """The session has received a command."""


class SessionCommands:
    """The commands of one session. Its waits raise `Stopped` as soon as there is one."""

    def __init__(self) -> None:
        #: The highest command so far.
        self.command: Command | None = None
        self._commanded = asyncio.Event()
        self._wake = asyncio.Event()

    def give(self, command: Command) -> None:
        """Add a command and interrupt all waits."""
        self.command = max(command, self.command or command)
        self._commanded.set()
        self._wake.set()

    def obey(self, state: LeaseState) -> None:
        """Turn what the store says of the lease, in reply to a renewal or a report, into a command."""
        if state is not LeaseState.HELD:
            self.give(Command[state.name])

    def wake(self) -> None:
        """End the wait of `sleep_until`, because there is news."""
        self._wake.set()

    async def sleep_until(self, due: float) -> None:
        """Sleep until `wake` is called or the monotonic clock reaches `due`. Raises `Stopped`."""
        try:
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        if self.command is not None:
            raise Stopped

    async def interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. On a command, cancels it, waits for its end and raises `Stopped`."""
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
