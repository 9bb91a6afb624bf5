"""Routes that read requests strictly, and routes whose work ends when the client goes away.

The framework's own reader lets NaN and halves of surrogate pairs pass, which later turn into internal errors,
and it passes over query parameters, form fields and bodies that a route did not ask for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterable, Iterator, Set
from typing import Any

from fastapi import Request, Response, params
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from service.http.errors import shown_path
from service.http.event_stream import until_disconnect
from service.http.json_bodies import JsonBodies
from service.http.schemas.fields import unknown_field
from tessera.errors import InvalidInput

#: Query parameters whose parts the caller names: `metadata[project]=x`.
DEEP_PARAMETERS = frozenset({"metadata"})

#: Never sent: the client is gone. The number is nginx's.
CLIENT_CLOSED_REQUEST = 499

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRequest(Request):
    """A request whose `json()` refuses NaN, lone surrogates, 5,000-digit integers and 200 nested lists."""

    async def json(self) -> Any:
        """Raises `json.JSONDecodeError`, which the framework turns into a validation error."""
        if not hasattr(self, "_json"):
            self._json = await self._read()
        return self._json

    async def _read(self) -> Any:
        reader: JsonBodies = self.app.state.services.json_bodies
        try:
            return await reader.read(self.state.tenant, await self.body())
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error

    def forget_body(self) -> None:
        """Let go of the body: a stream keeps its request for as long as it runs."""
        self._body = b""
        self._json = None


def _strict(request: Request) -> JsonRequest:
    if isinstance(request, JsonRequest):
        return request
    return JsonRequest(request.scope, request.receive)


class JsonRoute(APIRoute):
    """A route that reads its JSON strictly, and refuses what it does not know outside of it."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        query = {field.alias for part in _parts(self.dependant) for field in part.query_params}
        in_body = [field for part in _parts(self.dependant) for field in part.body_params]
        body = {field.alias for field in in_body}
        is_form = any(isinstance(field.field_info, params.Form) for field in in_body)

        async def handle_strictly(request: Request) -> Response:
            request = _strict(request)
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
            return await handle(request)

        return handle_strictly


def _parts(dependant: Dependant) -> Iterator[Dependant]:
    """A route's own parameters, and those of everything that it depends on."""
    yield dependant
    for part in dependant.dependencies:
        yield from _parts(part)


def _check_names(items: Iterable[tuple[str, object]], known: Set[str]) -> None:
    """Raises `InvalidInput` for a name that is unknown or comes twice."""
    seen = set()
    for name, _ in items:
        group = name.partition("[")[0] if name.endswith("]") else name
        if name not in known and not (group in DEEP_PARAMETERS and group in known):
            param, said = _dotted(name), unknown_field(name, known)
            raise InvalidInput(f"{param}: {said}", param=param, code="unknown_parameter")
        if name in seen:
            param = _dotted(name)
            raise InvalidInput(f"{param} is given more than once", param=param)
        seen.add(name)


def _dotted(name: str) -> str:
    """`a.b` for what forms and queries write as `a[b]`."""
    return shown_path(part.removesuffix("]") for part in name.split("["))


async def _refuse_body(request: JsonRequest) -> None:
    """Raises `InvalidInput` if there is anything in the body of a request that should have none."""
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


class CancellableRoute(JsonRoute):
    """A route whose handler is cancelled when its client disconnects: nobody waits for its tokens."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_while_wanted(request: Request) -> Response:
            request = _strict(request)
            await request.body()  # what arrives after it can only be the disconnect
            answer = await until_disconnect(request.receive, handle(request))
            request.forget_body()
            return answer or Response(status_code=CLIENT_CLOSED_REQUEST)

        return handle_while_wanted
