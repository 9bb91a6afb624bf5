"""The parts of a response beside the text: token ids, special tokens, and the stop string that ended it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from service.generation.text import TextCodec
from tests.fakes import FakeEngine
from tests.service.answers import CHAT, SOUND, TEXT, check_error
from tests.service.sse import parse

END = 6  # <|end|> of the bundled model


def script(engine: FakeEngine, codec: TextCodec, text: str) -> list[int]:
    """The engine answers every request with this text and the end token."""
    ids = [*codec.chat.text_ids(text), END]
    engine.script = lambda request: ids
    return ids


async def test_a_completion_lists_its_tokens_and_those_of_each_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    ids = script(engine, codec, "a é b")
    body = {"model": "tiny", "prompt": ["one", "two three"], "n": 2, "return_token_ids": True}

    choices = (await client.post(TEXT, json=body)).json()["choices"]

    assert [choice["token_ids"] for choice in choices] == [ids] * 4
    prompts = [codec.chat.text_ids(text) for text in ("one", "one", "two three", "two three")]
    assert [choice["prompt_token_ids"] for choice in choices] == prompts


async def test_a_chat_lists_its_prompt_once(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    ids = script(engine, codec, "a é b")
    body = {**SOUND[CHAT], "n": 2, "return_token_ids": True}

    answer = (await client.post(CHAT, json=body)).json()

    assert [choice["token_ids"] for choice in answer["choices"]] == [ids, ids]
    assert answer["prompt_token_ids"] == codec.chat.prompt_ids(SOUND[CHAT]["messages"])


async def test_nothing_is_listed_that_was_not_asked_for(client: httpx.AsyncClient) -> None:
    for url in (TEXT, CHAT):
        for given in ({}, {"return_token_ids": False}, {"return_token_ids": None}):
            text = (await client.post(url, json={**SOUND[url], **given})).text
            assert "token_ids" not in text


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("url", [TEXT, CHAT])
@pytest.mark.parametrize("more", [{}, {"stop": ["b"]}, {"logprobs": 1}], ids=["", "stop", "logprobs"])
async def test_a_stream_carries_every_token_once(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    codec: TextCodec,
    url: str,
    n: int,
    more: dict[str, Any],
) -> None:
    script(engine, codec, "a 好é b c")
    if "logprobs" in more and url == CHAT:
        more = {"logprobs": True}
    body = {**SOUND[url], "n": n, "return_token_ids": True, **more}
    whole = (await client.post(url, json=body)).json()

    *chunks, _ = parse((await client.post(url, json={**body, "stream": True})).text)

    for index, choice in enumerate(whole["choices"]):
        own = [(chunk, c) for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        streamed = [token_id for _, c in own for token_id in c.get("token_ids", [])]
        assert streamed == choice["token_ids"]
        shown = [(c if url == TEXT else chunk).get("prompt_token_ids") for chunk, c in own]
        first = choice["prompt_token_ids"] if url == TEXT else whole["prompt_token_ids"]
        assert shown == [first] + [None] * (len(own) - 1)


@pytest.mark.parametrize("url", [TEXT, CHAT])
async def test_log_probabilities_may_call_tokens_by_their_ids(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec, url: str
) -> None:
    ids = script(engine, codec, "a é")
    logprobs = {"logprobs": 1} if url == TEXT else {"logprobs": True, "top_logprobs": 1}
    asked = {"return_tokens_as_token_ids": True}

    choice = (await client.post(url, json={**SOUND[url], **logprobs, **asked})).json()["choices"][0]

    listed = choice["logprobs"]
    tokens = listed["tokens"] if url == TEXT else [entry["token"] for entry in listed["content"]]
    assert tokens == [f"token_id:{token_id}" for token_id in (ids if url == TEXT else ids[:-1])]
    error = check_error(await client.post(url, json={**SOUND[url], **asked}), 400)
    assert error["param"] == "return_tokens_as_token_ids"


@pytest.mark.parametrize("url", [TEXT, CHAT])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "one two three"),
        ({"skip_special_tokens": True, "include_stop_str_in_output": False}, "one two three"),
        ({"skip_special_tokens": False}, "one<|user|> two three"),
        ({"stop": "thr"}, "one two "),
        ({"stop": "thr", "include_stop_str_in_output": True}, "one two thr"),
        ({"stop": "<|user|>"}, "one two three"),
        ({"stop": "<|user|>", "skip_special_tokens": False}, "one"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "one<|user|> two three<|end|>"),
    ],
)
async def test_special_tokens_and_what_ends_a_text_can_be_shown(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    codec: TextCodec,
    url: str,
    stream: bool,
    given: dict[str, Any],
    text: str,
) -> None:
    script(engine, codec, "one<|user|> two three")
    reply = await client.post(url, json={**SOUND[url], **given, "stream": stream})

    if stream:
        choices = [c for chunk in parse(reply.text)[:-1] for c in chunk["choices"]]
        shown = "".join(c["text"] if url == TEXT else c["delta"].get("content", "") for c in choices)
    else:
        choice = reply.json()["choices"][0]
        shown = choice["text"] if url == TEXT else choice["message"]["content"]
    assert shown == text
