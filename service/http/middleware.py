"""The middleware in front of all routes: id, log line and limit of requests, API key, body.

Plain ASGI, so that streams and disconnects pass untouched. In this order, outermost first:

    RequestContext   request id, metrics, log line, the limit of concurrent requests, uncaught errors
    Authentication   before the body is read, so that strangers cannot fill the memory
    BodyLimit        reads the whole body in time; counts its bytes and does not trust the header
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTimeout, BodyTooLarge, ServiceOverloaded, ShuttingDown
from service.http.auth import ApiKeys
from service.http.errors import response_of
from service.http.received_body import ReceivedBody
from service.metrics.service_metrics import Metrics
from service.processes.fair_gate import FairGate
from tessera.errors import TesseraError
from tessera.processes.log_setup import log_fields

logger = logging.getLogger(__name__)

#: Everything under this path belongs to a tenant; health, metrics and documentation do not.
TENANT_PREFIX = "/v1"
UPLOAD_PATH = "/v1/files"
IMPORT_PATH = re.compile(r"/v1/adapters/[^/]+/peft")
#: The number of imports whose bodies are read at the same time. Each is kept in memory whole, and may be very
#: large.
MAX_IMPORTS = 2
#: How long the body of an import may take to arrive, in time-outs of an ordinary body.
IMPORT_TIMEOUTS = 10
#: Uploads whose bodies may be in temporary files at once, at their largest size; half as many of one tenant.
MAX_UPLOADS = 4
#: An upload may take one time-out for each of these bytes.
UPLOAD_BYTES_PER_TIMEOUT = 32 * 1024 * 1024

#: Bytes of a refused body that are still read and thrown away: a client that is cut off while it sends never
#: sees the response.
MAX_DISCARDED_BYTES = 64 * 1024 * 1024

#: Bodies up to this size are not counted against the memory for bodies: 10,000 of them take 160 MB.
SMALL_BODY_BYTES = 16 * 1024
#: Copies of a body that are in memory at once: its messages, the joined body, and what is made of it.
BODY_COPIES = 3

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
#: Paths that machines request every few seconds; they are neither limited nor logged.
_QUIET = {"/health/live", "/health/ready", "/metrics"}


class RequestContext:
    """Gives each request an id, counts, times and logs it; answers 500 for an error that was not caught.

    max_requests: how many requests may be answered at once. Health checks and metrics are not counted.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_requests: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max_requests = max_requests
        self._num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        inbound = Headers(scope=scope).get("x-request-id", "")
        request_id = inbound if _REQUEST_ID.fullmatch(inbound) else f"req_{uuid.uuid4().hex}"
        started_at, status = time.monotonic(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        is_limited = scope["path"] not in _QUIET
        is_refused = is_limited and self._num_running >= self._max_requests
        is_counted = is_limited and not is_refused
        if is_counted:
            self._num_running += 1
        self._metrics.http_in_flight.inc()
        fields_before = log_fields.set({**log_fields.get(), "request_id": request_id})
        try:
            if is_refused:
                error = ServiceOverloaded(
                    f"the service already answers {self._max_requests} requests (the limit)"
                )
                await response_of(error)(scope, receive, send_named)
            else:
                await self._app(scope, receive, send_named)
        except asyncio.CancelledError:
            # At a stop, uvicorn cancels requests that exceed its time limit. The exception is not passed on.
            if not status:
                stopping = ShuttingDown("the service is being stopped")
                await response_of(stopping)(scope, receive, send_named)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if not status:
                await response_of(error)(scope, receive, send_named)
        finally:
            if is_counted:
                self._num_running -= 1
            self._metrics.http_in_flight.dec()
            self._note(scope, request_id, status or 499, time.monotonic() - started_at)
            log_fields.reset(fields_before)

    def _note(self, scope: Scope, request_id: str, status: int, duration_s: float) -> None:
        """Count and log one request. status 499: the client left before there was a response."""
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_answered(route, method, status, duration_s)
        if route not in _QUIET:
            logger.info("%s %s %s %d %.3f s", request_id, method, route, status, duration_s)


class Authentication:
    """Lets a request to the API pass if its key is known, and puts its tenant into `request.state.tenant`."""

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
            log_fields.set({**log_fields.get(), "tenant": tenant})
        await self._app(scope, receive, send)


@dataclass(frozen=True)
class BodyLimits:
    """The limits of a request's body: its size, and the time in which it must arrive."""

    #: Limit of every body but uploads and imports.
    max_bytes: int
    max_upload_bytes: int
    max_import_bytes: int
    #: Limit of all bodies together except imports, copies included; half of it for one tenant.
    max_memory_bytes: int
    timeout_s: float


@dataclass(frozen=True)
class _Room:
    """What a body takes, and from where."""

    gate: FairGate
    #: The most bytes that the body may turn out to take.
    size: int


class BodyLimit:
    """Passes a request on once its whole body has arrived in time and within its limit.

    A body that is not small waits until there is memory for it before it is read, and keeps that memory until
    the response begins. A large upload waits for room in temporary files instead.
    """

    def __init__(self, app: ASGIApp, *, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits
        self._memory = FairGate(capacity=limits.max_memory_bytes, share=max(1, limits.max_memory_bytes // 2))
        self._disk = FairGate(
            capacity=MAX_UPLOADS * limits.max_upload_bytes, share=MAX_UPLOADS // 2 * limits.max_upload_bytes
        )
        self._num_imports = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_post, limit = scope["method"] == "POST", self._limits.max_bytes
        timeout_s = self._limits.timeout_s
        if is_post and IMPORT_PATH.fullmatch(scope["path"]):
            await self._pass_on_import(scope, receive, send)
            return
        is_upload = is_post and scope["path"] == UPLOAD_PATH
        if is_upload:
            limit = self._limits.max_upload_bytes
        size = _announced_bytes(scope, limit)
        if size <= SMALL_BODY_BYTES:
            await self._pass_on(scope, receive, send, limit, timeout_s)
        elif is_upload:
            timeout_s *= max(1, size / UPLOAD_BYTES_PER_TIMEOUT)
            room = _Room(self._disk, size)
            await self._pass_on_in_room(scope, receive, send, limit, timeout_s, room, is_spooled=True)
        else:
            room = _Room(self._memory, size * BODY_COPIES)
            await self._pass_on_in_room(scope, receive, send, limit, timeout_s, room)

    async def _pass_on_import(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._num_imports >= MAX_IMPORTS:
            error = ServiceOverloaded(f"the service already imports {MAX_IMPORTS} adapters (the limit)")
            await response_of(error)(scope, receive, send)
            return
        self._num_imports += 1
        try:
            timeout_s = IMPORT_TIMEOUTS * self._limits.timeout_s
            await self._pass_on(scope, receive, send, self._limits.max_import_bytes, timeout_s)
        finally:
            self._num_imports -= 1

    async def _pass_on_in_room(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        limit: int,
        timeout_s: float,
        room: _Room,
        *,
        is_spooled: bool = False,
    ) -> None:
        tenant = scope.get("state", {}).get("tenant", "")
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                taken = await room.gate.take(tenant, room.size)
        except TimeoutError:
            error = ServiceOverloaded("there is no room for another large request body; try again later")
            await response_of(error)(scope, receive, send)
            return

        def give_back() -> None:
            nonlocal taken
            if taken:
                room.gate.give_back(tenant, taken)
            taken = 0

        async def send_and_give_back(message: Message) -> None:
            give_back()  # the response has begun, so the body has been read
            await send(message)

        try:
            await self._pass_on(scope, receive, send_and_give_back, limit, timeout_s, is_spooled=is_spooled)
        finally:
            give_back()

    async def _pass_on(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        limit: int,
        timeout_s: float,
        *,
        is_spooled: bool = False,
    ) -> None:
        body = ReceivedBody(is_spooled=is_spooled)
        try:
            await self._read(body, Headers(scope=scope), receive, limit, timeout_s)
        except TesseraError as error:
            response = response_of(error)
            response.headers["connection"] = "close"  # the rest of the body is not read
            body.close()
            await response(scope, receive, send)
            return

        async def replay() -> Message:
            return await body.next() or await receive()

        try:
            await self._app(scope, replay, send)
        finally:
            body.close()

    async def _read(
        self, body: ReceivedBody, headers: Headers, receive: Receive, limit: int, timeout_s: float
    ) -> None:
        """Put the messages that make up the body into `body`. Raises `BodyTooLarge`, `BodyTimeout`."""
        declared = headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit + MAX_DISCARDED_BYTES):
            raise _too_large(limit)
        num_bytes = 0
        try:
            async with asyncio.timeout(timeout_s):
                has_more = True
                while has_more and num_bytes <= limit + MAX_DISCARDED_BYTES:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if num_bytes <= limit:
                        body.add(message)
                    else:
                        body.close()
                    has_more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError as error:
            if num_bytes <= limit:
                raise BodyTimeout(f"the request body did not arrive within {timeout_s:g} s") from error
        if num_bytes > limit:
            raise _too_large(limit)
        body.rewind()


def _announced_bytes(scope: Scope, limit: int) -> int:
    """Return the size of the body according to the headers, at most `limit`; `limit` if they give none."""
    headers = Headers(scope=scope)
    declared = headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 18:
        return min(int(declared), limit)
    return limit if "transfer-encoding" in headers else 0


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body has more than {limit} bytes (the limit)")
