"""A process of its own checks a large input with the same result as this process, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Iterator

import psutil
import pytest

from service.generation.generator import heavy_gate
from service.generation.text import TextCodec
from service.http import json_routes
from service.http.json_routes import MAX_THREAD_BYTES, JsonBodies
from service.jobs import upload_check
from service.jobs.upload_check import EXAMPLES, FileContent, UploadCheck
from service.processes.twin import Twin, fork_twin
from tessera.errors import InvalidTrainingData
from tests.waiting import has_ended, wait_until

MIB = 2**20


@pytest.fixture(scope="module")
def checks(codec: TextCodec) -> Iterator[tuple[UploadCheck, UploadCheck]]:
    """A check with a twin and one without."""
    twin = fork_twin(upload_check.upload_works(codec.chat))
    yield UploadCheck(codec.chat, twin), UploadCheck(codec.chat)
    twin.close()


@pytest.mark.parametrize(
    "content",
    [
        b"\n" * MIB,
        b" \r\n" * 200_000,
        b'{"prompt": "a", "completion": "b"}\n\n \r\n' * 2000,
        b'{"prompt": 3}\n' * 5000,
        b"[" * MIB,
        b'{"text": "' + b"a" * 2 * MIB + b'"}',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 1000,
        b'{"messages": [{"role": "assistant", "content": "b"}]}\n' * 1000,
    ],
    ids=["blank", "white", "sound", "wrong", "array", "long line", "conversations", "without a question"],
)
async def test_a_file_is_judged_alike_in_a_process_of_its_own(
    checks: tuple[UploadCheck, UploadCheck], content: bytes
) -> None:
    assert len(content) > upload_check.MAX_INLINE_BYTES

    apart, here = checks
    expected = await judged(here.read("t", content, with_users=False))
    assert await judged(apart.read("t", content, with_users=False)) == expected


async def judged(count: Awaitable[int]) -> object:
    """The number of examples, or everything that the error says about them."""
    try:
        return await count
    except InvalidTrainingData as error:
        return error.errors, error.code, error.num_problems, str(error)


async def test_a_calibration_file_is_judged_as_one(checks: tuple[UploadCheck, UploadCheck]) -> None:
    content = b'{"text": "a", "user": "u"}\n' * 2000
    assert await checks[0].read("t", content, with_users=True) == FileContent(EXAMPLES, 2000)
    with pytest.raises(InvalidTrainingData):
        await checks[0].read("t", content, with_users=False)


async def test_a_client_that_is_gone_costs_the_others_nothing(
    checks: tuple[UploadCheck, UploadCheck],
) -> None:
    content = b'{"text": "a"}\n' * 2000
    twin = checks[0]._twin
    assert twin is not None
    own, others = socket.socketpair()
    socket.send_fds(twin.requests, [b"-"], [others.fileno()])
    others.close()
    own.close()  # it finds nobody to answer
    several = [checks[0].read(f"t{i}", content, with_users=False) for i in range(4)]
    assert await asyncio.gather(*several) == [FileContent(EXAMPLES, 2000)] * 4


async def test_the_twin_ends_with_its_socket_and_is_waited_for() -> None:
    twin = fork_twin({})
    twin.requests.close()
    await wait_until(lambda: has_ended(twin.process_id))
    twin.close()
    assert not psutil.pid_exists(twin.process_id)


BODIES = {
    "text": b'{"model": "tiny", "prompt": "' + b"a " * 500_000 + b'"}',
    "escapes": b'{"model": "tiny", "prompt": "' + b"\\u00e9\\ud83d\\ude00\\n" * 50_000 + b'"}',
    "ids": b'{"prompt": [' + b"[1, 2.5, -7, true, null]," * 15_000 + b"12345678901234567890123]}",
    "objects": b'[{"a": {"b": "\xc3\xa9", "": [[]]}}, ' + b'"",' * 150_000 + b"{}]",
    "flood": b"[" + b"[]," * 200_000 + b"1]",
    "fields": b"{" + b",".join(b'"x%d": 0' % i for i in range(50_000)) + b"}",
    "broken": b'{"prompt": "' + b"a" * 500_000,
    "not a number": b'["' + b"a" * 500_000 + b'", NaN]',
    "half a pair": b'["' + b"a" * 500_000 + b"\\ud83d" + b'"]',
    "not UTF-8": b'["' + b"a" * 500_000 + b'\xff"]',
    "nested": b'["' + b"a" * 500_000 + b'", ' + b"[" * 300 + b"]" * 300 + b"]",
}


@pytest.fixture(scope="module")
def json_twin() -> Iterator[Twin]:
    twin = fork_twin(json_routes.json_works())
    yield twin
    twin.close()


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_is_read_alike_in_a_process_of_its_own(json_twin: Twin, name: str) -> None:
    body = BODIES[name]
    assert len(body) > MAX_THREAD_BYTES
    apart, here = JsonBodies(heavy_gate(), json_twin), JsonBodies(heavy_gate())
    expected = await value_or_error(here.read("t", body))
    assert await value_or_error(apart.read("t", body)) == expected


async def value_or_error(read: Awaitable[object]) -> str:
    """The `repr`, which distinguishes 1, 1.0 and True."""
    try:
        return repr(await read)
    except ValueError as error:
        return f"error: {error}"


@pytest.mark.parametrize("name", ["killed", "raises"])
async def test_work_that_ends_without_an_answer_gives_none_and_the_twin_works_on(name: str) -> None:
    def kill(content: bytes) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return content

    def fail(content: bytes) -> bytes:
        raise MemoryError

    twin = fork_twin({b"x": kill if name == "killed" else fail, b"r": lambda content: content[::-1]})
    try:
        for content in (b"ab", b"ab" * MIB):
            assert await twin.work(b"x", content) == b""
            assert await twin.work(b"r", content) == content[::-1]
    finally:
        twin.close()


async def test_a_large_body_is_refused_if_it_cannot_be_read() -> None:
    twin = fork_twin({b"j": lambda body: b""})
    try:
        with pytest.raises(ValueError, match="could not be read within"):
            await JsonBodies(heavy_gate(), twin).read("t", BODIES["text"])
    finally:
        twin.close()
