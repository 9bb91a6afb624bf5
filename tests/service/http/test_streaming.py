"""Streamed responses: the shapes of their events, failures in the middle, and readers that leave."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from service.generation.text import TextCodec
from tessera.errors import EngineOverloaded, EngineUnavailable
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine
from tests.service.conftest import MakeApp, publish, running_server, served, url_of
from tests.service.sse import DONE, parse
from tests.waiting import HANG_S, wait_until

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def text_body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "one two three four", "stream": True, "max_tokens": 6, **more}


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 6, **more}


async def events_of(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> list[Any]:
    reply = await client.post(url, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    return parse(reply.text)


async def test_a_streamed_completion_is_the_whole_one_in_pieces(client: httpx.AsyncClient) -> None:
    whole = (await client.post(TEXT, json=text_body(stream=False, logprobs=1))).json()

    *chunks, done = await events_of(client, TEXT, text_body(logprobs=1))

    assert done == DONE
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    streamed = [t for choice in choices if choice["logprobs"] for t in choice["logprobs"]["tokens"]]
    assert streamed == whole["choices"][0]["logprobs"]["tokens"]
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("body", [text_body, chat_body], ids=["completions", "chat"])
async def test_usage_may_come_in_every_chunk(client: httpx.AsyncClient, body: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}

    *chunks, last, done = await events_of(
        client, TEXT if body is text_body else CHAT, body(stream_options=options, ignore_eos=True)
    )

    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[-1], last["usage"]["completion_tokens"]) == (6, 6)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}
    assert (last["choices"], done) == ([], DONE)


async def test_usage_comes_last_and_without_choices(client: httpx.AsyncClient) -> None:
    body = text_body(stream_options={"include_usage": True})

    *chunks, usage, done = await events_of(client, TEXT, body)

    assert done == DONE
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert usage["x_tessera"]["max_distinct_in_batch"] == 1


async def test_the_last_chunk_says_which_adapter_answered(
    client: httpx.AsyncClient, adapters: AdapterStore
) -> None:
    await publish(adapters, "anna")

    *chunks, _ = await events_of(client, CHAT, chat_body(model="anna"))

    assert chunks[-1]["adapter"] == {"id": "anna", "version": 1}
    assert chunks[-1]["x_tessera"]["ttft_ms"] > 0
    assert all("adapter" not in chunk for chunk in chunks[:-1])


async def test_a_streamed_chat_begins_with_the_role(client: httpx.AsyncClient) -> None:
    *chunks, _ = await events_of(client, CHAT, chat_body())

    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1])
    assert deltas[-1] == {}


async def test_every_choice_has_its_own_role_text_and_end(client: httpx.AsyncClient) -> None:
    *chunks, _ = await events_of(client, CHAT, chat_body(n=3, seed=0, ignore_eos=True))

    choices = [chunk["choices"][0] for chunk in chunks]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"].get("role") == "assistant"
        assert [choice["finish_reason"] for choice in own].count("length") == 1
        assert own[-1]["finish_reason"] == "length"
    assert sum("x_tessera" in chunk for chunk in chunks) == 1


async def test_an_echo_is_streamed_once_per_choice(client: httpx.AsyncClient) -> None:
    *chunks, _ = await events_of(client, TEXT, text_body(echo=True, prompt=["one", "two"], logprobs=0))

    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert [text[:3] for text in texts] == ["one", "two"]


async def test_a_character_of_several_tokens_is_one_event(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    engine.script = lambda request: [*codec.chat.text_ids("a 🙂 é"), 6]

    *chunks, _ = await events_of(client, CHAT, chat_body(max_tokens=50))

    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "a 🙂 é"
    assert not any("\ufffd" in text for text in texts)


async def test_a_stop_string_across_tokens_is_never_streamed(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    engine.script = lambda request: codec.chat.text_ids("alpha beta gamma delta")

    *chunks, _ = await events_of(client, CHAT, chat_body(max_tokens=50, stop="ta gam", logprobs=True))

    deltas = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["delta"].get("content", "") for choice in deltas) == "alpha be"
    assert deltas[-1]["finish_reason"] == "stop"
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize(
    ("refusal", "status"), [(EngineOverloaded("full"), 503), (EngineUnavailable("secret"), 503)]
)
async def test_what_fails_before_the_first_token_has_its_own_status(
    client: httpx.AsyncClient, engine: FakeEngine, refusal: Exception, status: int
) -> None:
    engine.refusal = refusal

    reply = await client.post(CHAT, json=chat_body())

    assert reply.status_code == status
    assert reply.headers["retry-after"]
    assert "secret" not in reply.text


async def test_a_failure_after_the_headers_is_an_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = ("step_failed", "CUDA error at 0xdead"), 3

    events = await events_of(client, CHAT, chat_body())

    assert events[-1] == {
        "error": {
            "message": "the engine gave up on this request",
            "type": "server_error",
            "param": None,
            "code": "step_failed",
        }
    }
    assert DONE not in events


async def test_one_failed_choice_ends_the_others(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = ("corrupt_record", "fails its checksum"), 2

    events = await events_of(client, TEXT, text_body(n=4))

    assert events[-1]["error"]["code"] == "corrupt_record"
    assert events[-1]["error"]["param"] == "model"
    assert engine.running == {}


async def test_a_waiting_stream_is_kept_alive(make_app: MakeApp, engine: FakeEngine) -> None:
    engine.gate.clear()
    async with (
        served(make_app(ping_interval_s=0.05)) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", CHAT, json=chat_body()) as reply,
    ):
        received = ""
        async for text in reply.aiter_text():
            received += text
            if received.count(": ping\n\n") == 2:
                engine.gate.set()

    events = parse(received)
    assert events[-1] == DONE
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_tokens_are_sent_as_they_come(remote: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.gate.clear()
    async with asyncio.timeout(HANG_S), asyncio.TaskGroup() as tasks:

        async def read() -> list[str]:
            async with remote.stream("POST", TEXT, json=text_body(max_tokens=40)) as reply:
                return [text async for text in reply.aiter_text()]

        reading = tasks.create_task(read())
        await wait_until(lambda: engine.running)
        engine.gate.set()
    assert len(reading.result()) > 1


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("url", [TEXT, CHAT])
async def test_a_reader_that_leaves_ends_the_generation(
    remote: httpx.AsyncClient, engine: FakeEngine, url: str, stream: bool
) -> None:
    engine.gate.clear()
    body = text_body(stream=stream, n=2) if url == TEXT else chat_body(stream=stream, n=2)
    reading = asyncio.create_task(remote.post(url, json=body))
    await wait_until(lambda: len(engine.running) == 2)

    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)

    await wait_until(lambda: len(engine.cancelled) == 2)
    assert engine.running == {}


async def test_a_reader_that_leaves_within_a_stream_ends_the_generation(
    remote: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.gate.clear()
    engine.num_ungated = 3
    async with remote.stream("POST", CHAT, json=chat_body(max_tokens=200)) as reply:
        async for _ in reply.aiter_text():
            break

    await wait_until(lambda: engine.cancelled)


async def test_a_stream_that_the_servers_end_cuts_says_so(make_app: MakeApp, engine: FakeEngine) -> None:
    engine.gate.clear()
    engine.num_ungated = 3
    async with (
        running_server(make_app(), timeout_graceful_shutdown=0) as server,
        httpx.AsyncClient(base_url=url_of(server)) as client,
        client.stream("POST", CHAT, json=chat_body(max_tokens=200)) as reply,
    ):
        received = ""
        async for text in reply.aiter_text():
            received += text
            server.should_exit = True

    events = parse(received)
    assert events[-1]["error"]["code"] == "shutting_down"
    assert DONE not in events


async def test_a_plain_request_that_the_servers_end_cuts_says_so(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    engine.gate.clear()
    async with (
        running_server(make_app(), timeout_graceful_shutdown=0) as server,
        httpx.AsyncClient(base_url=url_of(server)) as client,
    ):
        asking = asyncio.create_task(client.post(CHAT, json=chat_body(stream=False)))
        await wait_until(lambda: engine.running)
        server.should_exit = True
        reply = await asking

    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "shutting_down"
