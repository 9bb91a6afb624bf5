"""The waits of a session: they end early on a command, or last until the store answers.

This module knows no job and no tensor.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable, Coroutine
from enum import IntEnum
from typing import Any, TypeVar, cast

from tessera.errors import Unavailable
from tessera.queue.leases import LeaseState

T = TypeVar("T")
S = TypeVar("S")

#: Seconds between two attempts to reach the store: they double from the first to the second value.
FIRST_RETRY_S, MAX_RETRY_S = 0.1, 2.0


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
        #: The owner wants the best state so far to be published now. No wait is interrupted for this.
        self.is_stop_requested = False
        self._commanded = asyncio.Event()
        self._wake = asyncio.Event()

    def give(self, command: Command) -> None:
        """Add a command and interrupt all waits."""
        self.command = max(command, self.command or command)
        self._commanded.set()
        self._wake.set()

    def obey(self, state: LeaseState) -> None:
        """Turn what the store says of the lease, in reply to a renewal or a report, into a command."""
        if state is LeaseState.STOP:
            self.is_stop_requested = True
            self._wake.set()
        elif state is not LeaseState.HELD:
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
        """Return the result of `work`. On a command, cancel it, wait for its end and raise `Stopped`."""
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


def retrying(store: S, note_outage: Callable[[Unavailable], None]) -> S:
    """Return a proxy that repeats each coroutine method of the object while it raises `Unavailable`.

    note_outage is called after every attempt that failed. All other exceptions pass.
    """
    return cast(S, _Retrying(store, note_outage))


class _Retrying:
    def __init__(self, store: object, note_outage: Callable[[Unavailable], None]) -> None:
        self._store, self._note_outage = store, note_outage

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._store, name)
        if not inspect.iscoroutinefunction(attribute):
            return attribute

        @functools.wraps(attribute)
        async def call_until_available(*args: Any, **kwargs: Any) -> Any:
            delay_s = FIRST_RETRY_S
            while True:
                try:
                    return await attribute(*args, **kwargs)
                except Unavailable as error:
                    self._note_outage(error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RETRY_S)

        return call_until_available
