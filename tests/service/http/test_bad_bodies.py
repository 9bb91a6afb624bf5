"""Bodies that are invalid JSON, too large or too slow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from service.http.middleware import UPLOAD_PATH
from tests.fakes import FakeEngine
from tests.service.answers import SCORE, SOUND, TEXT, check_error
from tests.service.conftest import MakeApp, client_of, served

RAW_BODIES = {
    "NaN": b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    "Infinity": b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
    "1e999": b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
    "lone surrogate": b'{"model": "tiny", "prompt": "\\ud800"}',
    "5000 digits": b'{"model": "tiny", "prompt": "a", "n": ' + b"1" * 5000 + b"}",
    "deep": b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not UTF-8": b'{"model": "tiny", "prompt": "\xff"}',
    "UTF-16": '{"model": "tiny", "prompt": "a"}'.encode("utf-16"),
    "cut off": b'{"model": "tiny", ',
    "empty": b"",
    "a list": b"[]",
    "a string": b'"tiny"',
    "null": b"null",
}


@pytest.mark.parametrize("name", RAW_BODIES)
async def test_a_body_that_is_no_sound_json_is_400(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    reply = await client.post(TEXT, content=RAW_BODIES[name], headers={"content-type": "application/json"})

    check_error(reply, 400)
    assert engine.requests == []


async def test_json_must_be_called_json(client: httpx.AsyncClient) -> None:
    reply = await client.post(TEXT, content=json.dumps(SOUND[TEXT]), headers={"content-type": "text/plain"})

    assert "application/json" in check_error(reply, 400)["message"]


async def test_what_was_sent_is_not_sent_back(client: httpx.AsyncClient) -> None:
    secret = "my-secret" * 1000

    for wrong in (
        {"temperature": secret},
        {"stop": [secret] * 99},
        {secret: 1, "n": 0},
        {"prompt": {secret: 1}},
    ):
        reply = await client.post(TEXT, json={**SOUND[TEXT], **wrong})
        assert secret not in reply.text
        assert len(reply.content) < 2000


async def test_a_native_endpoint_cuts_short_the_names_it_refuses(client: httpx.AsyncClient) -> None:
    reply = await client.post(SCORE, json={**SOUND[SCORE], "x" * 10_000: 1})

    assert len(check_error(reply, 400)["param"]) == 64


async def _large() -> AsyncIterator[bytes]:
    """A body sent in chunks, so that no header gives its length."""
    yield b'{"model": "tiny", "prompt": "'
    for _ in range(200):
        yield b"a" * 10_000
    yield b'"}'


@pytest.mark.parametrize("url", [TEXT, UPLOAD_PATH])
async def test_a_body_is_counted_as_it_comes(make_app: MakeApp, url: str) -> None:
    app = make_app(max_body_bytes=50_000, max_upload_bytes=50_000)
    async with served(app) as base, httpx.AsyncClient(base_url=base) as client:
        reply = await client.post(url, content=_large(), headers={"content-type": "application/json"})

    assert check_error(reply, 413)["code"] == "body_too_large"


@pytest.mark.parametrize("size", [1025, 10**12, 10**40])
async def test_a_body_that_says_it_is_too_large_is_refused(make_app: MakeApp, size: int) -> None:
    async with client_of(make_app(max_body_bytes=1024)) as client:
        reply = await client.post(TEXT, content=b"x" * 1025, headers={"content-length": str(size)})

    check_error(reply, 413)


async def send_raw(url: str, body: bytes, content_length: int) -> bytes:
    """Everything that the service sends before it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-length: {content_length}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_body_of_absurd_size_is_refused_before_it_is_sent(server: str) -> None:
    answer = await send_raw(server, b"", 10**12)

    assert answer.startswith(b"HTTP/1.1 413")
    assert b"x-request-id: " in answer


async def test_a_body_that_does_not_come_is_408(make_app: MakeApp) -> None:
    async with served(make_app(body_timeout_s=0.1)) as url:
        answer = await send_raw(url, b"{", 100)

    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"body_timeout"' in answer
