"""Routes that read requests strictly, and routes whose work ends when the client leaves.

The framework's own reader accepts NaN and halves of surrogate pairs, which later become internal errors, and
ignores query parameters, form fields and bodies that a route does not declare. Here JSON is read strictly and
within bounds, and a large body in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import marshal
from collections.abc import Callable, Coroutine, Iterable, Iterator, Set
from typing import Any, ClassVar

from fastapi import Request, Response, params
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic_core import from_json

from service.http.errors import shown_path
from service.http.event_stream import until_disconnect
from service.http.schemas.fields import unknown_field
from service.processes.fair_gate import FairGate
from service.processes.twin import DEFAULT_LIMITS, Twin, Work
from tessera.errors import InvalidInput

#: Query parameters with names that the caller chooses: `metadata[project]=x`.
DEEP_PARAMETERS = frozenset({"metadata"})

#: nginx's number for a client that has left. It is never sent.
CLIENT_CLOSED_REQUEST = 499

#: Larger bodies are read in a thread, admitted fairly between tenants: 64 KB take about 2 ms.
MAX_INLINE_BYTES = 64 * 1024
#: Even larger bodies are read in a process of their own, because the reader holds Python's lock: 25 ms for 4
#: MB of escapes, 10 ms for as many numbers as are allowed, and at most 5 ms for this size.
MAX_THREAD_BYTES = 256 * 1024
#: The most values of a body: 256 thousand token ids, or as many of anything else. The reader takes 0.1 s for
#: 4 MB of numbers, and a second for 4 MB of `[],`.
MAX_VALUES = 256 * 1024
MAX_CONTAINERS = 16 * 1024
#: The most fields of one object. Every unknown or wrong field is an error of its own, which takes 50 µs to
#: report.
MAX_FIELDS = 2048
#: Smaller bodies cannot have more fields than that.
_FEW_FIELDS_BYTES = 8 * 1024
#: Bytes that are checked at a time: 0.1 ms.
_PIECE_BYTES = 64 * 1024
#: The first byte of the twin's reply.
_VALUE, _ERROR = b"v", b"e"
#: The twin's name of this work.
_NAME = b"j"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRequest(Request):
    """A request whose `json()` refuses NaN, lone surrogates, 5,000-digit integers and 200 nested lists."""

    async def json(self) -> Any:
        """Return the parsed body. Raises `json.JSONDecodeError`, which the framework makes a validation
        error."""
        if not hasattr(self, "_json"):
            reader: JsonBodies = self.app.state.services.json_bodies
            try:
                self._json = await reader.read(self.state.tenant, await self.body())
            except ValueError as error:
                raise json.JSONDecodeError(str(error), "", 0) from error
        return self._json


class JsonRoute(APIRoute):
    """A route that reads its JSON strictly and refuses unknown parameters, form fields and bodies."""

    #: Whether the handler is cancelled when its client disconnects.
    is_cancellable: ClassVar[bool] = False

    def get_route_handler(self) -> Handler:
        """Return a handler that checks all names of a request before the framework's own handler runs."""
        handle = super().get_route_handler()
        query = {field.alias for part in _parts(self.dependant) for field in part.query_params}
        in_body = [field for part in _parts(self.dependant) for field in part.body_params]
        body = {field.alias for field in in_body}
        is_form = any(isinstance(field.field_info, params.Form) for field in in_body)

        async def handle_strictly(plain: Request) -> Response:
            request = JsonRequest(plain.scope, plain.receive)
            _check_names(request.query_params.multi_items(), query)
            if is_form:
                form = await request.form()
                try:
                    _check_names(form.multi_items(), body)
                except InvalidInput:
                    await form.close()
                    raise
            elif not body:
                await _refuse_body(request)
            if not self.is_cancellable:
                return await handle(request)
            await request.body()  # whatever arrives after the body can only be the disconnect
            response = await until_disconnect(request.receive, handle(request))
            request._body, request._json = b"", None  # free it: a stream keeps its request while it runs
            return response or Response(status_code=CLIENT_CLOSED_REQUEST)

        return handle_strictly


class CancellableRoute(JsonRoute):
    """A route whose handler is cancelled when its client disconnects, because the result is no longer
    needed."""

    is_cancellable = True


def _parts(dependant: Dependant) -> Iterator[Dependant]:
    """Yield a route's own parameters, and those of all its dependencies."""
    yield dependant
    for part in dependant.dependencies:
        yield from _parts(part)


def _check_names(items: Iterable[tuple[str, object]], known: Set[str]) -> None:
    """Check that every name is known and given once. Raises `InvalidInput`."""
    seen = set()
    for name, _ in items:
        group = name.partition("[")[0] if name.endswith("]") else name
        if name not in known and not (group in DEEP_PARAMETERS and group in known):
            param = _dotted(name)
            message = f"{param}: {unknown_field(name, known)}"
            raise InvalidInput(message, param=param, code="unknown_parameter")
        if name in seen:
            param = _dotted(name)
            raise InvalidInput(f"{param} is given more than once", param=param)
        seen.add(name)


def _dotted(name: str) -> str:
    """Return the name `a[b]` of a form or a query as `a.b`."""
    return shown_path(part.removesuffix("]") for part in name.split("["))


async def _refuse_body(request: JsonRequest) -> None:
    """Check that a request that should have no body has none. Raises `InvalidInput`."""
    if (await request.body()).strip() in (b"", b"{}", b"null"):
        return
    try:
        given = await request.json()
    except json.JSONDecodeError:
        given = None
    param = shown_path(list(given)[:1]) if isinstance(given, dict) else None
    message = "a request to this endpoint has no body"
    raise InvalidInput(
        message if param is None else f"{param}: {message}", param=param, code="unknown_parameter"
    )


class JsonBodies:
    """Reads the JSON of bodies strictly and within bounds.

    gate: admits large bodies, fairly between tenants. twin: reads the largest ones, with `json_works`; None:
    they are read in threads of this process.
    """

    def __init__(self, gate: FairGate, twin: Twin | None = None) -> None:
        self._gate = gate
        self._twin = twin

    async def read(self, tenant: str, body: bytes) -> Any:
        """Return the value of a body. Raises `ValueError` for invalid JSON, NaN, lone surrogates, 5,000-digit
        integers, 200 nested lists, and too many values."""
        if len(body) <= _FEW_FIELDS_BYTES:
            return from_json(body, allow_inf_nan=False)
        if len(body) <= MAX_INLINE_BYTES:
            return read_large(body)
        async with self._gate.room(tenant):
            if self._twin is None or len(body) <= MAX_THREAD_BYTES:
                return await asyncio.to_thread(read_large, body)
            reply = await self._twin.work(_NAME, body)
        await asyncio.sleep(0)  # the reply may be as large as the body: give other tasks a turn
        if reply[:1] == _VALUE:
            value = marshal.loads(reply[1:])  # safe: it was written by a fork of this very process
            await asyncio.sleep(0)  # before it is validated
            return value
        raise ValueError(bytes(reply[1:]).decode() or f"it could not be read within {DEFAULT_LIMITS}")


def json_works() -> dict[bytes, Work]:
    """Return the work of reading a body, for `fork_twin`."""

    def work(body: bytes) -> bytes:
        try:
            return _VALUE + marshal.dumps(read_large(body))
        except ValueError as error:
            return _ERROR + str(error).encode("utf-8", "replace")

    return {_NAME: work}


def read_large(body: bytes) -> Any:
    """Return the value of a body that is checked first. Raises `ValueError`."""
    check_structure(body)
    value = from_json(body, allow_inf_nan=False)
    check_objects(value)
    return value


def check_structure(body: bytes) -> None:
    """Count the values that the reader would make. Raises `ValueError` if there are too many.

    Counts outside strings, piece by piece, so that Python's lock is free in between, and stops at the limits:
    1 ms per MB.
    """
    num_values = num_containers = start = 0
    is_in_string = False
    while start < len(body):
        end = _piece_end(body, start)
        # Without its escapes, a string is everything between two quotes.
        plain = body[start:end].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = plain.split(b'"')
        first_outside = 1 if is_in_string else 0  # parts outside and inside of strings alternate
        outside = b"".join(parts[first_outside::2])
        if len(parts) % 2 == 0:
            is_in_string = not is_in_string
        containers = outside.count(b"[") + outside.count(b"{")
        num_containers += containers
        num_values += containers + outside.count(b",")
        if num_containers > MAX_CONTAINERS or num_values > MAX_VALUES:
            raise ValueError(
                f"a body may have up to {MAX_VALUES} values and {MAX_CONTAINERS} lists and objects; "
                "send several smaller requests"
            )
        start = end


def _piece_end(body: bytes, start: int) -> int:
    """Return the end of the piece that begins at `start`, which does not fall within an escape."""
    end = min(start + _PIECE_BYTES, len(body))
    piece = body[start:end]
    num_backslashes = len(piece) - len(piece.rstrip(b"\\"))
    return end + num_backslashes % 2


def check_objects(value: Any) -> None:
    """Check that no object has too many fields, at any depth. Raises `ValueError`."""
    open_values = [value] if isinstance(value, dict | list) else []
    while open_values:
        value = open_values.pop()
        if isinstance(value, dict):
            if len(value) > MAX_FIELDS:
                raise ValueError(f"an object may have up to {MAX_FIELDS} fields")
            value = value.values()
        open_values += [item for item in value if isinstance(item, dict | list)]
