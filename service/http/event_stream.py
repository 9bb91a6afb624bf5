"""Server-sent events: a response that grows while the client listens, and ends when the client leaves.

Does not know the content of the events. A stream that is cut without its last event looks like success to a
client, so a failure after the headers is sent as an event of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import ShuttingDown
from service.http.errors import body_of, response_of
from tessera.processes.tasks import end_tasks

#: The second media type of a route that can stream, for OpenAPI.
IN_OPENAPI: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"

#: `json.dumps` with options makes a new encoder on each call: 2 µs of the 20 µs that a streamed token costs.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode

T = TypeVar("T")


def event(value: Any) -> str:
    """Return one event with a JSON value as its data. Raises `ValueError` for NaN."""
    return f"data: {_encode(value)}\n\n"


class EventStream(Response):
    """A response made of server-sent events.

    The first event is awaited before the headers (for up to one ping interval), so that an early failure
    still gets a status of its own. A later failure is the last event of the stream. A comment is sent
    whenever nothing happens for `ping_interval_s`, because proxies cut silent connections.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], *, ping_interval_s: float) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._ping_interval_s = ping_interval_s
        self._first: asyncio.Future[str | None] | None = None
        self._sent_at = 0.0
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def begin(self) -> EventStream:
        """Wait for the first event. Raises what the events raise before it."""
        self._first = asyncio.ensure_future(anext(self._events, None))
        try:
            await asyncio.wait({self._first}, timeout=self._ping_interval_s)
            if self._first.done() and self._first.exception() is not None:
                await self._first
        except BaseException:
            await self._close()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except asyncio.CancelledError:  # the server is stopping and has waited long enough
            text = _error_event(ShuttingDown("the service is being stopped"))
            await send({"type": "http.response.body", "body": text.encode(), "more_body": False})
            raise
        finally:
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        pings = asyncio.create_task(self._ping(send))  # beside the events: a task for each event cost 10 µs
        assert self._first is not None, "the stream has begun"
        pending: Awaitable[str | None] = self._first
        try:
            while True:
                try:
                    text = await pending
                except Exception as error:  # a generator that raised has ended: nothing follows this event
                    text = _error_event(error)
                if text is None:
                    break
                self._sent_at = loop.time()
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                await asyncio.sleep(0)  # neither await above is guaranteed to yield; give other tasks a turn
                pending = anext(self._events, None)
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

    async def _close(self) -> None:
        if self._first is not None:
            await end_tasks(self._first)
        await self._events.aclose()


def _error_event(error: Exception) -> str:
    """Return the event that reports a failure to the client."""
    response_of(error)  # logs the details that the client does not get
    return event(body_of(error))


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T | None:
    """Return the result of `work`; None if the client leaves before it is done, which cancels it."""
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
