"""Routes that read JSON strictly, and routes whose work ends when the client goes away.

The framework's own reader lets NaN and halves of surrogate pairs pass, which later turn into internal errors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from service.event_stream import until_disconnect

#: Larger bodies are parsed in a thread: 256 KB take about 7 ms.
MAX_INLINE_BYTES = 256 * 1024
#: Never sent: the client is gone. The number is nginx's.
CLIENT_CLOSED_REQUEST = 499

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRequest(Request):
    """A request whose `json()` refuses NaN, lone surrogates, 5,000-digit integers and 200 nested lists."""

    async def json(self) -> Any:
        """Raises `json.JSONDecodeError`, which the framework turns into a validation error."""
        body = await self.body()
        try:
            if len(body) > MAX_INLINE_BYTES:
                return await asyncio.to_thread(from_json, body, allow_inf_nan=False)
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


def _strict(request: Request) -> JsonRequest:
    if isinstance(request, JsonRequest):
        return request
    return JsonRequest(request.scope, request.receive)


class JsonRoute(APIRoute):
    """A route that reads its JSON strictly."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_strict(request))

        return handle_strictly


class CancellableRoute(JsonRoute):
    """A route whose handler is cancelled when its client disconnects: nobody waits for its tokens."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_while_wanted(request: Request) -> Response:
            request = _strict(request)
            await request.body()  # what arrives after it can only be the disconnect
            return await until_disconnect(request.receive, handle(request)) or Response(
                status_code=CLIENT_CLOSED_REQUEST
            )

        return handle_while_wanted
