"""Server-sent events: an answer that grows while the client listens, and ends when it stops listening.

Knows nothing of what the events say. A stream cut without its last event looks like success to a client, so
whatever goes wrong after the headers is said in an event of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import ShuttingDown
from tessera.processes.tasks import end_tasks

#: For OpenAPI: what a route that can stream answers besides JSON.
IN_OPENAPI: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"

#: `json.dumps` with options makes an encoder on each call, 2 µs of the 20 that a streamed token costs.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode

T = TypeVar("T")


def event(value: Any) -> str:
    """One event that carries a JSON value. Raises `ValueError` for NaN."""
    return f"data: {_encode(value)}\n\n"


class EventStream(Response):
    """An answer made of events. error_event: how a failure is said once the headers are out.

    The first event is awaited before the headers (for up to one ping interval), so that what fails at once
    still gets its own status. After that a comment is sent whenever nothing happens for `ping_interval_s`:
    proxies cut silent connections.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        *,
        error_event: Callable[[Exception], str],
        ping_interval_s: float,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._error_event = error_event
        self._ping_interval_s = ping_interval_s
        self._next: asyncio.Task[str | None] | None = None
        self._sent_at = 0.0
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def begin(self) -> EventStream:
        """Wait for the first event. Raises what the events raise before it."""
        self._next = _fetch(self._events)
        try:
            await asyncio.wait({self._next}, timeout=self._ping_interval_s)
            if self._next.done() and self._next.exception() is not None:
                await self._next
        except BaseException:
            await self._close()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except asyncio.CancelledError:  # the server stops and has waited long enough
            text = self._error_event(ShuttingDown("the service is being stopped"))
            await send({"type": "http.response.body", "body": text.encode(), "more_body": False})
            raise
        finally:
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        pings = asyncio.create_task(self._ping(send))  # beside the events: a task for each cost 10 µs
        try:
            async with aclosing(self._texts()) as texts:
                async for text in texts:
                    self._sent_at = loop.time()
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                    await asyncio.sleep(0)  # neither need have waited, and others want their turn
        finally:
            await end_tasks(pings)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            quiet_s = loop.time() - self._sent_at
            if quiet_s >= self._ping_interval_s:
                self._sent_at, quiet_s = loop.time(), 0.0
                await send({"type": "http.response.body", "body": PING.encode(), "more_body": True})
            await asyncio.sleep(self._ping_interval_s - quiet_s)

    async def _texts(self) -> AsyncGenerator[str, None]:
        """The events, the first of which was begun to be waited for; a failure as the last of them."""
        try:
            if self._next is not None and (first := await self._next) is not None:
                self._next = None
                yield first
            async for text in self._events:
                yield text
        except Exception as error:
            yield self._error_event(error)

    async def _close(self) -> None:
        if self._next is not None:
            await end_tasks(self._next)
            self._next = None
        await self._events.aclose()


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`, which is cancelled when the client goes away; then None."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await end_tasks(task, watcher)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _fetch(events: AsyncGenerator[str, None]) -> asyncio.Task[str | None]:
    async def fetch() -> str | None:
        return await anext(events, None)

    return asyncio.create_task(fetch())
