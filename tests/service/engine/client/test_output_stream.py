"""Outputs that wait for a slow reader: all of them arrive, in little memory, or the slowest reader is cut."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.engine.client.connection import MAX_APART, Backlog, OutputStream
from service.engine.wire.messages import TokenLogprobs, TokenOutput
from tessera.errors import RequestFailed
from tests.service.engine.client.test_attachment import Served, attached, request
from tests.waiting import HANG_S, wait_until


def output(token: int, **fields: object) -> TokenOutput:
    logprobs = [TokenLogprobs(token, -1.0, [(token, -1.0), (0, -2.0)])]
    return TokenOutput("r", [token], logprobs, num_distinct=token % 5, **fields)


async def test_a_slow_reader_gets_all_of_it_from_few_objects() -> None:
    backlog = Backlog()
    stream, other = OutputStream(backlog), OutputStream(backlog)
    other.put(output(1))
    own = other.num_bytes
    stream.put(output(0, prompt_logprobs=[TokenLogprobs(7, -3.0)], num_cached_tokens=3))
    for token in range(1, 1000):
        stream.put(output(token))
    stream.put(output(1000, finish_reason="length"))
    assert len(stream._pending) == MAX_APART
    assert backlog.num_bytes == stream.num_bytes + own

    whole = await stream.next()

    assert whole.token_ids == [entry.token_id for entry in whole.logprobs] == list(range(1001))
    assert whole.prompt_logprobs == [TokenLogprobs(7, -3.0)]
    assert (whole.finish_reason, whole.num_cached_tokens, whole.num_distinct) == ("length", 3, 4)
    assert (stream.num_bytes, backlog.num_bytes) == (0, own)


async def test_a_stream_that_is_cut_holds_nothing_and_says_why() -> None:
    backlog = Backlog()
    stream = OutputStream(backlog)
    stream.put(output(1))
    stream.cut(RequestFailed("too slow", code="reader_too_slow"))
    stream.put(output(2))
    assert backlog.num_bytes == 0
    with pytest.raises(RequestFailed, match="too slow"):
        await stream.next()


async def test_beyond_the_limit_the_slowest_reader_is_given_up_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    async with Served(path).running() as served, attached(path) as engine:
        await engine.wait_ready(HANG_S)
        slow, quick = (engine.generate(request(name, max_tokens=150)) for name in ("slow", "quick"))
        await anext(slow)
        engine.max_backlog_bytes = 1000  # 25 tokens
        tokens = [token async for output in quick for token in output.token_ids]
        assert len(tokens) == 150
        with pytest.raises(RequestFailed) as caught:
            async for _ in slow:
                pass
        assert caught.value.code == "reader_too_slow"
        await wait_until(lambda: engine.stats is not None and engine.stats.num_running == 0)
        assert engine._backlog.num_bytes == 0
        engine.max_backlog_bytes = 10**9
        left = engine.generate(request("left", max_tokens=150))
        await anext(left)
        await asyncio.sleep(0)
        await left.aclose()
        assert engine._backlog.num_bytes == 0
        await engine.check_integrity()
    assert served.engine.stats().kv_blocks_used == 0
