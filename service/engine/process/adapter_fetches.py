"""Adapters on their way from the store to the engine: each of them once, those of one moment together.

A fetch begins when a request for the adapter arrives, not when the engine, between two steps, has seen that
it lacks it: on a busy device that is a step earlier (10 to 30 ms). What the engine asks for is mostly on its
way by then. Knows neither the store nor the engine's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from service.engine.adapters.packed_adapter import PackedAdapter
from tessera.errors import TesseraError
from tessera.formats.adapter_ref import AdapterRef

Found = PackedAdapter | TesseraError

#: Read by one MGET. Of a larger crowd the first are handed over while the others are still read and verified:
#: at 115 kB each takes 0.1 ms, so 256 at once would keep the first one waiting for 28 ms.
MAX_READ = 16


class AdapterFetches:
    """read: the adapters of some refs, or the errors in their place. provide: what hands one to the engine,
    which says when it has it by `arrived`. spawn: runs a coroutine beside. Lives in the asyncio loop."""

    def __init__(
        self,
        read: Callable[[Sequence[AdapterRef]], Awaitable[list[Found]]],
        provide: Callable[[AdapterRef, Found], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._read = read
        self._provide = provide
        self._spawn = spawn
        self._on_the_way: set[AdapterRef] = set()
        self._next: list[AdapterRef] = []

    def fetch(self, refs: Iterable[AdapterRef]) -> None:
        """Begin to fetch those that are not on their way; all that is asked for in one turn of the event loop
        travels together."""
        for ref in refs:
            if ref in self._on_the_way:
                continue
            self._on_the_way.add(ref)
            self._next.append(ref)
            if len(self._next) == 1:
                asyncio.get_running_loop().call_soon(self._begin)

    def arrived(self, ref: AdapterRef) -> None:
        """The engine has taken it in: from now on it may be asked for again."""
        self._on_the_way.discard(ref)

    def _begin(self) -> None:
        refs, self._next = self._next, []
        for start in range(0, len(refs), MAX_READ):
            self._spawn(self._run(refs[start : start + MAX_READ]))

    async def _run(self, refs: Sequence[AdapterRef]) -> None:
        for ref, found in zip(refs, await self._read(refs), strict=True):
            self._provide(ref, found)
