"""What every request passes on its way to a route: a name and a count, the check who calls, limits on bodies.

Plain ASGI, so that streams and disconnects pass untouched. In this order, outermost first:

    RequestContext   request id, metrics, log line, the last catch for what nobody caught
    RequestLimit     so many requests at once and no more
    Authentication   before a body is read, so that strangers cannot make us keep one
    BodyLimit        reads the whole body: counted, not believed; in time, or not at all
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import deque
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTimeout, BodyTooLarge, ServiceOverloaded, ShuttingDown
from service.http.auth import ApiKeys
from service.http.errors import response_of
from service.metrics.service_metrics import Metrics
from service.processes.fair_gate import FairGate
from tessera.errors import TesseraError
from tessera.processes.log_setup import add_to_log_context, log_context

logger = logging.getLogger(__name__)

#: Everything under it belongs to a tenant; health, metrics and documentation belong to nobody.
TENANT_PREFIX = "/v1"
UPLOAD_PATH = "/v1/files"
IMPORT_PATH = re.compile(r"/v1/adapters/[^/]+/peft")
#: Imports that are read at once: each is kept whole, and is much larger than anything else.
MAX_IMPORTS = 2
#: What an import may take to arrive, in time-outs of an ordinary body.
IMPORT_TIMEOUTS = 10

#: Of a body that is refused, so much is still read and thrown away: a client that is cut off while it sends
#: never sees the answer.
MAX_DISCARDED_BYTES = 64 * 1024 * 1024

#: Smaller bodies need no room of their own: 10,000 of them have 160 MB.
SMALL_BODY_BYTES = 16 * 1024
#: How often a body lies in memory at once: as it came, as it was read, as it is handed on.
BODY_COPIES = 3

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
#: Asked every few seconds by machines: not worth a line each.
_QUIET = {"/health/live", "/health/ready", "/metrics"}


class RequestContext:
    """Names, counts, times and logs each request; answers 500 for what nobody caught."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        inbound = Headers(scope=scope).get("x-request-id", "")
        request_id = inbound if _REQUEST_ID.fullmatch(inbound) else f"req_{uuid.uuid4().hex}"
        with log_context(request_id=request_id):
            await self._answer(request_id, scope, receive, send)

    async def _answer(self, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        started_at, status = time.monotonic(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._metrics.http_in_flight.inc()
        try:
            await self._app(scope, receive, send_named)
        except asyncio.CancelledError:
            # Uvicorn cancels what outlives its patience at a stop; above us is nobody who needs to know.
            if not status:
                await response_of(ShuttingDown("the service is being stopped"))(scope, receive, send_named)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if not status:
                await response_of(error)(scope, receive, send_named)
        finally:
            self._metrics.http_in_flight.dec()
            self._note(scope, request_id, status or 499, time.monotonic() - started_at)

    def _note(self, scope: Scope, request_id: str, status: int, duration_s: float) -> None:
        """status 499: the client went away before there was an answer."""
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_answered(route, method, status, duration_s)
        if route not in _QUIET:
            logger.info("%s %s %s %d %.3f s", request_id, method, route, status, duration_s)


class RequestLimit:
    """Turns requests away while as many as allowed are being answered. Health checks get in."""

    def __init__(self, app: ASGIApp, *, max_requests: int) -> None:
        self._app = app
        self._max_requests = max_requests
        self._num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _QUIET:
            await self._app(scope, receive, send)
            return
        if self._num_running >= self._max_requests:
            error = ServiceOverloaded(f"{self._max_requests} requests are being answered already")
            await response_of(error)(scope, receive, send)
            return
        self._num_running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_running -= 1


class Authentication:
    """Lets a request to the API pass if its key is known, and notes its tenant in `request.state.tenant`."""

    def __init__(self, app: ASGIApp, *, api_keys: ApiKeys) -> None:
        self._app = app
        self._api_keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and (path == TENANT_PREFIX or path.startswith(TENANT_PREFIX + "/")):
            try:
                tenant = self._api_keys.tenant_of(Headers(scope=scope).get("authorization"))
            except TesseraError as error:
                await response_of(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
            add_to_log_context(tenant=tenant)
        await self._app(scope, receive, send)


@dataclass(frozen=True)
class BodyLimits:
    """max_bytes: of any body but those to the upload path and to the import paths, which have their own.
    max_memory_bytes: of all bodies but imports together, copies included; half of it for one tenant."""

    max_bytes: int
    max_upload_bytes: int
    max_import_bytes: int
    max_memory_bytes: int
    timeout_s: float


class BodyLimit:
    """Hands on a request whose body has come whole, in time and within its limit.

    A body that is not small waits for room in memory before it is read, and keeps it until the answer begins.
    """

    def __init__(self, app: ASGIApp, *, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits
        self._memory = FairGate(capacity=limits.max_memory_bytes, share=max(1, limits.max_memory_bytes // 2))
        self._num_imports = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] != "POST" or IMPORT_PATH.fullmatch(scope["path"]) is None:
            is_upload = scope["method"] == "POST" and scope["path"] == UPLOAD_PATH
            limit = self._limits.max_upload_bytes if is_upload else self._limits.max_bytes
            await self._pass_on_in_room(scope, receive, send, limit)
        elif self._num_imports >= MAX_IMPORTS:
            error = ServiceOverloaded(f"{MAX_IMPORTS} adapters are being imported already")
            await response_of(error)(scope, receive, send)
        else:
            self._num_imports += 1
            try:
                limits = (self._limits.max_import_bytes, IMPORT_TIMEOUTS * self._limits.timeout_s)
                await self._pass_on(scope, receive, send, limits)
            finally:
                self._num_imports -= 1

    async def _pass_on_in_room(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        limits = (limit, self._limits.timeout_s)
        size = _announced_bytes(scope, limit)
        if size <= SMALL_BODY_BYTES:
            await self._pass_on(scope, receive, send, limits)
            return
        tenant = scope.get("state", {}).get("tenant", "")
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                taken = await self._memory.take(tenant, size * BODY_COPIES)
        except TimeoutError:
            error = ServiceOverloaded("as many large bodies as there is memory for are being read; try again")
            await response_of(error)(scope, receive, send)
            return

        def give_back() -> None:
            nonlocal taken
            if taken:
                self._memory.give_back(tenant, taken)
            taken = 0

        async def send_and_give_back(message: Message) -> None:
            give_back()  # the answer has begun: the body has been read
            await send(message)

        try:
            await self._pass_on(scope, receive, send_and_give_back, limits)
        finally:
            give_back()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, limits: tuple[int, float]) -> None:
        """limits: of the body, in bytes and seconds."""
        try:
            messages = await self._read(Headers(scope=scope), receive, *limits)
        except TesseraError as error:
            response = response_of(error)
            response.headers["connection"] = "close"  # what was not read until now is not read
            await response(scope, receive, send)
            return

        async def replay() -> Message:
            if not messages:
                return await receive()
            if len(messages) > 1:
                await asyncio.sleep(0)  # 32 MB are read in 512 pieces; others get their turn in between
            return messages.popleft()

        await self._app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive, limit: int, timeout_s: float) -> deque[Message]:
        """The body's messages. Raises `BodyTooLarge`, `BodyTimeout`."""
        declared = headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit + MAX_DISCARDED_BYTES):
            raise _too_large(limit)
        messages: deque[Message] = deque()
        num_bytes = 0
        try:
            async with asyncio.timeout(timeout_s):
                has_more = True
                while has_more and num_bytes <= limit + MAX_DISCARDED_BYTES:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if num_bytes <= limit:
                        messages.append(message)
                    else:
                        messages.clear()
                    has_more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError as error:
            if num_bytes <= limit:
                raise BodyTimeout(f"the body did not arrive within {timeout_s:g} s") from error
        if num_bytes > limit:
            raise _too_large(limit)
        return messages


def _announced_bytes(scope: Scope, limit: int) -> int:
    """What a request says that its body has, up to the limit; the limit if it does not say."""
    headers = Headers(scope=scope)
    declared = headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 18:
        return min(int(declared), limit)
    return limit if "transfer-encoding" in headers else 0


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body exceeds {limit} bytes")
