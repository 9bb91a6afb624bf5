"""POST /v1/chat/completions, whole answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from service.text import TextCodec
from tests.fakes import FakeEngine, fake_logprob

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello there"}]


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await client.post(URL, json={"model": "tiny", "messages": HELLO, **body})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_a_conversation_is_continued(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    engine.script = lambda request: [*codec.chat.text_ids("good day"), 6]

    answer = await chat(client)

    assert answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "good day", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    request = engine.requests[0]
    assert request.token_ids == codec.chat.prompt_ids(HELLO)
    assert request.sampling.max_tokens == engine.info.max_model_len - len(request.token_ids)


async def test_content_may_come_in_parts_and_developers_are_the_system(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "x"}]

    await chat(client, messages=messages)

    plain = [{"role": "system", "content": "be brief"}, *HELLO]
    assert engine.requests[0].token_ids == codec.chat.prompt_ids(plain)


@pytest.mark.parametrize(
    "limit", [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}]
)
async def test_the_limit_has_two_names(
    client: httpx.AsyncClient, engine: FakeEngine, limit: dict[str, int]
) -> None:
    await chat(client, **limit)

    assert engine.requests[0].sampling.max_tokens == 3


async def test_logprobs_have_tokens_bytes_and_alternatives(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    token_ids = codec.chat.text_ids("é!")
    engine.script = lambda request: [*token_ids, 6]

    answer = await chat(client, logprobs=True, top_logprobs=2)

    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [fake_logprob(t) for t in token_ids]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "é!"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


async def test_several_choices(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await chat(client, n=3, max_tokens=2, seed=1, ignore_eos=True)

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].token_ids)
    assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": []},
        {"tools": None},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"user": "me", "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"metadata": {"a": "b"}},
        {"user": {"id": "u", "role": "admin"}},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_what_changes_nothing_is_passed_over(
    client: httpx.AsyncClient, harmless: dict[str, Any]
) -> None:
    await chat(client, max_tokens=1, **harmless)
