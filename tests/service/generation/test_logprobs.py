"""Log-probabilities of completions and chats: one entry per token, with its place in the text."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.generation.text import TextCodec
from tests.fakes import FakeEngine, fake_logprob
from tests.service.conftest import MakeApp, client_of
from tests.service.generation.token_kinds import BYTE_FALLBACK, EXACT, llama2
from tests.service.sse import parse

URL, CHAT = "/v1/completions", "/v1/chat/completions"
END = 6
TEXTS = st.text(alphabet="helo wa é🙂�", max_size=12)


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await client.post(URL, json={"model": "tiny", "temperature": 0, **body})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def streamed(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    reply = await client.post(URL, json={"model": "tiny", "stream": True, **body})
    return [chunk["choices"][0] for chunk in parse(reply.text) if chunk != "[DONE]" and chunk["choices"]]


@pytest.mark.parametrize("script", [[END], [300, END], [300, 301, END], [300, 301, 302, 303, 304]])
@pytest.mark.parametrize("max_tokens", [0, 1, 2, 5])
@pytest.mark.parametrize("echo", [True, False])
async def test_every_token_that_usage_counts_has_an_entry(
    client: httpx.AsyncClient, engine: FakeEngine, script: list[int], max_tokens: int, echo: bool
) -> None:
    if max_tokens == 0 and not echo:
        return
    engine.script = lambda request: script
    prompt = [400, 401, 402]

    answer = await complete(client, prompt=prompt, max_tokens=max_tokens, logprobs=1, echo=echo)

    choice, generated = answer["choices"][0], script[:max_tokens]
    expected = [*(prompt if echo else []), *generated]
    logprobs = [fake_logprob(token) for token in expected]
    assert choice["logprobs"]["token_logprobs"] == ([None, *logprobs[1:]] if echo else logprobs)
    assert {len(column) for column in choice["logprobs"].values()} == {len(expected)}
    assert answer["usage"]["completion_tokens"] == len(generated)
    assert choice["finish_reason"] == ("stop" if END in generated else "length")


@pytest.mark.parametrize("prompt", [[END], [END, END, END], [400], [END, 400]])
@pytest.mark.parametrize("script", [[], [END], [300, END]])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_streamed_echo_has_the_entries_of_a_whole_one_also_without_text(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: list[int], script: list[int], n: int
) -> None:
    engine.script = lambda request: script
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": len(script), "n": n}
    whole = [choice["logprobs"] for choice in (await complete(client, **body))["choices"]]
    chunks = [chunk for chunk in await streamed(client, temperature=0, **body) if chunk["logprobs"]]
    for index, expected in enumerate(whole):
        own = [chunk["logprobs"] for chunk in chunks if chunk["index"] == index]
        assert {name: [x for part in own for x in part[name]] for name in expected} == expected


async def test_the_end_token_has_a_name_and_no_text(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    engine.script = lambda request: [*codec.chat.text_ids("yes"), END]

    choice = (await complete(client, prompt="a", max_tokens=9, logprobs=1))["choices"][0]

    assert choice["text"] == "yes"
    assert choice["logprobs"]["tokens"][-1] == "<|end|>"
    assert choice["logprobs"]["text_offset"][-1] == len("yes")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("script", [[END], [300, 301, END], [300, 301, 302, 303]])
async def test_a_stream_has_the_entries_of_the_whole_answer(
    client: httpx.AsyncClient, engine: FakeEngine, script: list[int], n: int
) -> None:
    engine.script = lambda request: script
    body = {"prompt": [[400, END, 401], [402]], "max_tokens": 4, "logprobs": 2, "echo": True, "n": n}

    whole = await complete(client, **body)
    chunks = await streamed(client, **body)

    for expected in whole["choices"]:
        own = [chunk for chunk in chunks if chunk["index"] == expected["index"]]
        assert "".join(chunk["text"] for chunk in own) == expected["text"]
        for name, column in expected["logprobs"].items():
            got = [entry for chunk in own if chunk["logprobs"] for entry in chunk["logprobs"][name]]
            assert got == column


async def test_a_prompt_as_long_as_the_context_is_scored_but_not_continued(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    longest = [300 + i % 7 for i in range(engine.info.max_model_len)]

    answer = await complete(client, prompt=longest, max_tokens=0, echo=True, logprobs=0)
    refused = await client.post(URL, json={"model": "tiny", "prompt": longest, "max_tokens": 1, "echo": True})
    longer = {"model": "tiny", "prompt": [*longest, 300], "max_tokens": 0, "echo": True}

    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(longest)
    assert answer["usage"]["completion_tokens"] == 0
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert (await client.post(URL, json=longer)).json()["error"]["code"] == "context_length_exceeded"


async def test_a_text_as_long_as_the_context_is_scored(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    limit = engine.info.max_model_len
    text = codec.decode(codec.chat.text_ids("a" + " a" * limit)[: limit - 1])
    assert len(codec.chat.text_ids(text)) == limit - 1, "an end token follows"

    reply = await client.post("/v1/score", json={"model": "tiny", "input": [{"text": text}]})

    assert reply.json()["data"][0]["num_tokens"] == limit - 1


async def test_offsets_point_into_the_text_past_special_tokens(client: httpx.AsyncClient) -> None:
    prompt = "<|user|>one 🙂 two<|end|> <|assistant|>three"

    for more in ({"max_tokens": 0}, {"max_tokens": 5}):
        choice = (await complete(client, prompt=prompt, echo=True, logprobs=1, **more))["choices"][0]
        assert choice["text"].startswith(prompt)
        check_offsets(choice, num_shown=choice["text"].index(prompt) + len(prompt))


async def test_offsets_of_token_ids_pass_over_special_tokens(
    client: httpx.AsyncClient, codec: TextCodec
) -> None:
    ids = codec.chat.text_ids("<|user|>one two<|end|><|assistant|>three")

    choice = (await complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=0))["choices"][0]

    logprobs = choice["logprobs"]
    assert choice["text"] == "one twothree"
    assert logprobs["text_offset"][logprobs["tokens"].index("<|end|>")] == len("one two")
    assert logprobs["text_offset"][logprobs["tokens"].index("<|user|>")] == 0


def check_offsets(choice: dict[str, Any], num_shown: int) -> None:
    """Check that every whole token, up to `num_shown` characters, is the text between its offset and the
    next."""
    offsets, text = choice["logprobs"]["text_offset"], choice["text"]
    assert offsets == sorted(offsets)
    for token, start, end in zip(
        choice["logprobs"]["tokens"], offsets, [*offsets[1:], len(text)], strict=True
    ):
        if start < num_shown and not token.startswith("bytes:"):
            assert text[start:end] == token


@given(text=TEXTS, special=st.sampled_from(["", "<|user|>", "</s>"]), rest=TEXTS)
def test_offsets_in_a_text_prompt_are_where_its_tokens_read(text: str, special: str, rest: str) -> None:
    """A tokenizer that puts a space in front, and spells unknown characters in bytes."""
    codec = LLAMA2
    prompt = text + special + rest
    ids = codec.chat.tokenizer(prompt)["input_ids"]

    echo = codec.echo(ids, prompt)

    assert echo.text == prompt
    ends = [*echo.offsets[1:], len(prompt)]
    for token_id, start, end in zip(ids, echo.offsets, ends, strict=True):
        name = codec.token_text(token_id, is_first=False)
        assert prompt[start:end] in (name, name.removeprefix(" "), "") or name.startswith("bytes:")
    assert ids[0] == 1
    assert ends[0] == 0, "the start token has no text"


LLAMA2 = TextCodec(llama2())


async def test_a_less_likely_token_never_takes_the_place_of_another_with_the_same_text(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    codec = TextCodec(BYTE_FALLBACK["byte fallback"]())
    a, byte = codec.chat.tokenizer.convert_tokens_to_ids(["a", "<0x61>"])
    assert codec.token_text(a) == codec.token_text(byte) == "a"
    engine.tops = {400: [(byte, -0.1), (a, -0.5)], a: [(byte, -0.1)]}
    engine.script = lambda request: [400, a]

    async with client_of(make_app(codec=codec)) as client:
        answer = await complete(client, prompt=[byte], max_tokens=2, logprobs=2)

    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {"a": -0.1, "": fake_logprob(400)}
    assert logprobs["top_logprobs"][1] == {"a": -0.1}
    assert logprobs["token_logprobs"][1] == fake_logprob(a)


async def test_the_chosen_token_is_among_the_most_likely(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.tops = {300: [(301, -0.01)]}
    engine.script = lambda request: [300]

    top = (await complete(client, prompt="a", max_tokens=1, logprobs=1))["choices"][0]["logprobs"]

    assert len(top["top_logprobs"][0]) == 2
    assert top["top_logprobs"][0][top["tokens"][0]] == fake_logprob(300)


async def test_the_first_word_has_no_space_in_the_logprobs_either(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    codec = TextCodec(BYTE_FALLBACK["byte fallback that strips"]())
    hello = codec.chat.tokenizer.convert_tokens_to_ids("▁hello")
    engine.script = lambda request: [1, hello, hello, 3]

    async with client_of(make_app(codec=codec)) as client:
        choice = (await complete(client, prompt=[1], max_tokens=4, logprobs=1))["choices"][0]
        echoed = (await complete(client, prompt=[1, hello], max_tokens=4, logprobs=1, echo=True))["choices"][
            0
        ]

    assert (choice["text"], echoed["text"]) == ("hello hello", "hello hello hello")
    assert choice["logprobs"]["tokens"] == ["<s>", "hello", " hello", "<|user|>"]
    assert echoed["logprobs"]["tokens"] == ["<s>", "hello", "<s>", " hello", " hello", "<|user|>"]
    assert echoed["logprobs"]["text_offset"] == [0, 0, 5, 5, 11, 17]


async def test_a_character_that_a_prompt_of_token_ids_began_is_echoed_whole(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    *begun, end = codec.chat.text_ids("a 🙂")
    other = codec.chat.text_ids("x")
    texts = {}
    for name, script in (("finished", [end]), ("dropped", other)):
        engine.script = lambda request, script=script: script
        for echo in (True, False):
            body = {"prompt": begun, "max_tokens": 1, "echo": echo}
            texts[name, echo] = (await complete(client, **body))["choices"][0]["text"]

    assert texts == {
        ("finished", True): "a 🙂",
        ("finished", False): "🙂",
        ("dropped", True): "a �x",
        ("dropped", False): "x",
    }


async def test_tokens_behind_a_stop_string_have_no_entry_in_a_stream_either(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    engine.script = lambda request: codec.chat.text_ids("alpha beta gamma delta")
    body = {"prompt": "a", "stop": " gamma", "max_tokens": 50, "logprobs": 1, "echo": True}

    whole = (await complete(client, **body))["choices"][0]
    chunks = await streamed(client, **body)

    assert whole["text"] == "aalpha beta"
    assert "".join(whole["logprobs"]["tokens"]) == "aalpha beta"
    got = [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["tokens"]]
    assert got == whole["logprobs"]["tokens"]


async def test_a_chats_logprobs_are_those_of_its_content(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    for text in ("", "é 🙂!", " two words"):
        ids = codec.chat.text_ids(text) if text else []
        engine.script = lambda request, ids=ids: [*ids, END]
        answer = (await client.post(CHAT, json={**body, "top_logprobs": 3})).json()

        content = answer["choices"][0]["logprobs"]["content"]
        assert [entry["logprob"] for entry in content] == [fake_logprob(token) for token in ids]
        assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text
        assert answer["choices"][0]["message"]["content"] == text
        assert answer["usage"]["completion_tokens"] == len(ids) + 1


async def test_a_scored_text_begins_without_the_space_that_its_tokenizer_puts_in_front(
    make_app: MakeApp,
) -> None:
    async with client_of(make_app(codec=LLAMA2)) as client:
        body = {"model": "tiny", "input": [{"text": "hello wé"}], "return_tokens": True}
        report = (await client.post("/v1/score", json=body)).json()

    assert "".join(token["token"] for token in report["data"][0]["tokens"]).removesuffix("</s>") == "hello wé"


@pytest.mark.parametrize("kind", [*BYTE_FALLBACK, "metaspace", "wordpiece", "word ends"])
async def test_no_tokens_fail_a_request_and_streams_are_as_whole_answers(
    make_app: MakeApp, engine: FakeEngine, kind: str
) -> None:
    """Random tokens, most of them bytes, of a vocabulary that is padded beyond the tokenizer's."""
    codec = TextCodec({**EXACT, **BYTE_FALLBACK}[kind]())
    ids = range(codec.vocab_size + 9)
    engine.script = lambda request: random.Random(request.sampling.seed).choices(ids, k=40)
    more = {"prompt": [4, 5, 6], "max_tokens": 40, "ignore_eos": True}

    async with client_of(make_app(codec=codec)) as client:
        for seed in range(20):
            stop = ["�", "hello"] if seed % 3 == 0 else []
            body = {
                **more,
                "seed": seed,
                "stop": stop,
                "logprobs": 1,
                "echo": seed % 2 == 0,
                "n": 1 + seed % 3,
            }
            whole = await complete(client, **body)
            chunks = await streamed(client, **body)
            for choice in whole["choices"]:
                own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
                assert "".join(chunk["text"] for chunk in own) == choice["text"]
                got = [t for chunk in own if chunk["logprobs"] for t in chunk["logprobs"]["tokens"]]
                assert got == choice["logprobs"]["tokens"]
