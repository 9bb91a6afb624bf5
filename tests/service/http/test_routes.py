"""Properties of every route."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute


def test_no_request_waits_for_a_thread(app: FastAPI) -> None:
    """FastAPI would run a plain function in a thread: 0.1 ms on an idle machine, more on a busy one."""
    calls = {call for route in api_routes(app.routes) for call in calls_of(route.dependant)}

    assert len(calls) > 40
    assert [call for call in calls if not is_coroutine(call)] == []


def api_routes(routes: list[BaseRoute]) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from api_routes(router.routes)


def calls_of(dependant: Dependant) -> Iterator[object]:
    yield dependant.call
    for inner in dependant.dependencies:
        yield from calls_of(inner)


def is_coroutine(call: object) -> bool:
    """Whether a function, or the call of an object, is a coroutine function."""
    methods = dict(inspect.getmembers(type(call)))
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(methods.get("__call__"))
