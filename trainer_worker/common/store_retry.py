"""Calls that are repeated for as long as the store does not answer."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from tessera.errors import Unavailable

T = TypeVar("T")
S = TypeVar("S")

#: Seconds between two attempts to reach the store: they double from the first to the second value.
FIRST_RETRY_S, MAX_RETRY_S = 0.1, 2.0


def retrying(store: S, note_outage: Callable[[Unavailable], None]) -> S:
    """The same object, except that each of its coroutine methods is repeated while it raises `Unavailable`.

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
            return await until_available(lambda: attribute(*args, **kwargs), self._note_outage)

        return call_until_available


async def until_available(call: Callable[[], Awaitable[T]], note_outage: Callable[[Unavailable], None]) -> T:
    """The result of `call`, repeated until the store answers."""
    delay_s = FIRST_RETRY_S
    while True:
        try:
            return await call()
        except Unavailable as error:
            note_outage(error)
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, MAX_RETRY_S)
