"""Every error has one shape: unknown routes, bugs, errors of the engine, parts that are down."""

from __future__ import annotations

import httpx
import pytest

from tessera.errors import EngineOverloaded, TenantOverloaded
from tests.fakes import FakeEngine
from tests.service.answers import SOUND, TEXT, check_error


@pytest.mark.parametrize(
    ("method", "url", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_route"),
        ("GET", "/v1/nothing", 404, "unknown_route"),
        ("POST", "/v1/completions/", 404, "unknown_route"),
        ("PUT", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/score", 405, "method_not_allowed"),
    ],
)
async def test_what_does_not_exist_has_the_same_shape(
    client: httpx.AsyncClient, method: str, url: str, status: int, code: str
) -> None:
    reply = await client.request(method, url)

    assert check_error(reply, status)["code"] == code
    if status == 405:
        assert reply.headers["allow"]


async def test_a_bug_is_a_500_that_tells_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    def broken(request: object) -> list[int]:
        raise RuntimeError("secret: /etc/passwd")

    engine.script = broken

    reply = await client.post(TEXT, json=SOUND[TEXT], headers={"x-request-id": "mine-1"})

    error = check_error(reply, 500)
    assert error["code"] == "internal_error"
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize(
    ("failure", "status", "code", "param"),
    [
        (("corrupt_record", "fails its checksum"), 409, "corrupt_record", "model"),
        (("model_not_found", "gone"), 404, "model_not_found", "model"),
        (("basis_mismatch", "another basis"), 409, "basis_mismatch", "model"),
        (("adapter_replaced", "send it again"), 503, "adapter_replaced", None),
        (("store_unavailable", "at /secret"), 503, "store_unavailable", None),
        (("deadline_exceeded", "not finished within 1 s"), 504, "deadline_exceeded", None),
        (("anything_else", "at /secret"), 500, "anything_else", None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
async def test_what_the_engine_reports_keeps_its_meaning(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    failure: tuple[str, str],
    status: int,
    code: str,
    param: str | None,
) -> None:
    engine.failure = failure

    reply = await client.post(TEXT, json=SOUND[TEXT])

    error = check_error(reply, status)
    assert (error["code"], error["param"]) == (code, param)
    assert "/secret" not in reply.text
    assert reply.headers.get("x-should-retry") == ("false" if status == 409 else None)


async def test_an_engine_that_starts_asks_to_come_again(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.is_ready = False

    reply = await client.post(TEXT, json=SOUND[TEXT])

    assert check_error(reply, 503)["code"] == "engine_unavailable"
    assert int(reply.headers["retry-after"]) > 0
    assert "/secret" not in reply.text


async def test_a_full_engine_asks_to_come_again(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusal = EngineOverloaded("4096 requests wait")

    reply = await client.post(TEXT, json=SOUND[TEXT])

    assert check_error(reply, 503)["code"] == "engine_overloaded"
    assert int(reply.headers["retry-after"]) > 0


async def test_a_tenant_with_too_many_requests_is_asked_to_try_again(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.refusal = TenantOverloaded("2048 requests of yours are waiting already")

    reply = await client.post(TEXT, json=SOUND[TEXT])

    error = check_error(reply, 429)
    assert (error["code"], error["type"]) == ("tenant_overloaded", "rate_limit_error")
    assert error["message"].startswith("2048 requests of yours")
    assert int(reply.headers["retry-after"]) > 0
    assert "x-should-retry" not in reply.headers


async def test_request_ids_are_taken_over_only_if_they_are_sane(client: httpx.AsyncClient) -> None:
    async def id_for(inbound: str) -> str:
        return (await client.get("/version", headers={"x-request-id": inbound})).headers["x-request-id"]

    assert await id_for("abc-123") == "abc-123"
    assert (await id_for("a b")).startswith("req_")
    assert (await id_for("x" * 200)).startswith("req_")
