"""Inputs are bounded before one client's input can slow down the others."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from service.generation.generator import MAX_INLINE_CHARACTERS
from service.generation.prompt_bound import PromptBound, prompt_bound
from service.generation.text import TextCodec
from service.http.json_routes import MAX_CONTAINERS, MAX_VALUES, check_objects, check_structure
from service.http.middleware import BODY_COPIES, BodyLimit, BodyLimits
from service.http.schemas.generation import ChatCompletionRequest, CompletionRequest
from service.http.schemas.score import ScoreRequest
from tessera.store.files import CHUNK_BYTES
from tests.fakes import FakeEngine
from tests.service.answers import CHAT, TEXT, check_error
from tests.waiting import wait_until

MIB = 2**20


@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec, path: str
) -> None:
    bound = prompt_bound(codec.chat.tokenizer.backend_tokenizer)
    assert bound is not None
    text = "a " * (bound.ascii_chars * engine.info.max_model_len // 2 + 1)
    prompt = {"prompt": text} if path == TEXT else {"messages": [{"role": "user", "content": text + "a"}]}

    error = check_error(await client.post(path, json={"model": "tiny", **prompt}), 400)

    assert error["code"] == "context_length_exceeded"
    assert "certainly" in error["message"]


@given(st.text(max_size=200) | st.text("aeé́ ­İ가각\n", max_size=200))
def test_no_token_stands_for_more_characters_than_the_bound_says(codec: TextCodec, text: str) -> None:
    backend = codec.chat.tokenizer.backend_tokenizer
    bound = prompt_bound(backend)
    assert bound is not None
    num_tokens = len(backend.encode(text, add_special_tokens=False).ids)
    assert len(text) <= num_tokens * (bound.ascii_chars if text.isascii() else bound.other_chars)


def small_backend(**model: object) -> Backend:
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    return Backend(models.BPE(vocab=vocabulary, merges=[("a", "b")], **model))


def test_a_tokenizer_that_drops_or_fuses_characters_has_no_bound() -> None:
    assert prompt_bound(small_backend()) == PromptBound(5, 5)
    assert prompt_bound(small_backend(unk_token="<unk>", fuse_unk=True)) is None
    assert prompt_bound(small_backend(unk_token="<unk>", byte_fallback=True)) == PromptBound(5, 5)
    cases = {
        "strips": normalizers.Strip(),
        "shortens": normalizers.Replace("aa", "a"),
        "by expression": normalizers.Sequence([normalizers.NFC(), normalizers.Replace(r"\s+", " ")]),
    }
    for normalizer in cases.values():
        backend = small_backend()
        backend.normalizer = normalizer
        assert prompt_bound(backend) is None or normalizer is cases["by expression"]
    backend = small_backend()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert prompt_bound(backend) is None
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.normalizer = normalizers.NFKC()
    backend.decoder = decoders.Metaspace()
    assert prompt_bound(backend) == PromptBound(5, 20)


@pytest.mark.parametrize(
    ("body", "is_sound"),
    [
        (b"[" + b"1," * (MAX_VALUES - 2) + b"1]", True),
        (b"[" + b"1," * MAX_VALUES + b"1]", False),
        (b"[" + b"[]," * MAX_CONTAINERS + b"[]]", False),
        (b'{"p": "' + b"f(x)[i] = {a, b}; " * 100_000 + b'"}', True),
        (b'{"p": "' + b'\\"[,' * 200_000 + b'\\\\"}', True),
        (b'{"p": "\\\\", "q": [' + b"{}," * 200_000 + b"1]}", False),
        (b'{"p": [' + b'"",' * 2 * MAX_VALUES + b'""]}', False),
        (b'{"p": "' + b"\\\\" * 65536 + b'", "q": [' + b"[]," * MAX_CONTAINERS + b"1]}", False),
        (b'{"p": "x' + b"\\\\" * 65536 + b'\\"' + b"[," * MAX_VALUES + b'"}', True),
    ],
    ids=[
        "ids",
        "too many ids",
        "lists",
        "code",
        "escapes",
        "backslash before",
        "empty strings",
        "backslashes over the edge of a piece",
        "a quote after them",
    ],
)
def test_values_are_counted_where_they_are_values(body: bytes, is_sound: bool) -> None:
    json.loads(body)
    if is_sound:
        check_structure(body)
    else:
        with pytest.raises(ValueError, match="values"):
            check_structure(body)


FLOODS = {
    "nulls for ids": {"prompt": [None] * 200_000},
    "lists of nulls": {"prompt": [[None] * 800] * 256},
    "numbers for texts": {"prompt": ["a", *range(200_000)]},
    "stop": {"prompt": "a", "stop": [None] * 200_000},
    "bias": {"prompt": "a", "logit_bias": {str(i): "x" for i in range(100_000)}},
    "unknown": {"prompt": "a", **{f"x{i}": 0 for i in range(100_000)}},
    "messages": {"messages": [{"role": 1, "content": 1}] * 2048},
    "parts": {"messages": [{"role": "user", "content": [{}] * 15_000}]},
    "fields of a part": {"messages": [{"role": "user", "content": [{f"x{i}": 0 for i in range(60_000)}]}]},
    "items": {"input": [None] * 200_000},
    "scored messages": {"input": [{"messages": [{}] * 2048}]},
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_of_mistakes_is_reported_in_a_few_words(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    """One error for each mistake would take seconds and gigabytes."""
    schemas = {"prompt": CompletionRequest, "messages": ChatCompletionRequest, "input": ScoreRequest}
    flood = {"model": "tiny", **FLOODS[name]}
    [(field, schema)] = [item for item in schemas.items() if item[0] in flood]
    path = {"prompt": TEXT, "messages": CHAT, "input": "/v1/score"}[field]

    error = check_error(await client.post(path, json=flood), 400)

    assert len(error["message"]) < 2000
    assert engine.requests == []
    try:
        check_objects(flood)
    except ValueError:
        return  # it is not judged any further
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(flood)
    assert caught.value.error_count() <= 32


async def test_floods_of_values_are_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = b'{"model": "tiny", "prompt": [' + b"[]," * 100_000 + b"[5]]}"
    reply = await client.post(TEXT, content=body, headers={"content-type": "application/json"})
    assert str(MAX_VALUES) in check_error(reply, 400)["message"]
    assert engine.requests == []


async def test_a_large_prompt_waits_for_its_tenants_turn_and_nobody_elses(
    client: httpx.AsyncClient, engine: FakeEngine, app
) -> None:
    """A small request is answered while another tenant's large input is read."""
    gate = app.state.services.json_bodies._gate
    taken = await gate.take("default", 1)
    large = "word " * MAX_INLINE_CHARACTERS
    waiting = asyncio.create_task(client.post("/v1/score", json={"model": "tiny", "input": [large]}))
    await wait_until(lambda: gate.num_waiting == 1)
    small = await client.post(TEXT, json={"model": "tiny", "prompt": "a", "max_tokens": 1})
    assert small.status_code == 200
    assert not waiting.done()
    gate.give_back("default", taken)
    check_error(await waiting, 400)


class Bodies:
    """An application behind `BodyLimit` that responds when the test allows it, and shows the memory taken."""

    def __init__(self, max_memory_bytes: int) -> None:
        limits = BodyLimits(4 * MIB, 32 * MIB, 512 * MIB, max_memory_bytes, timeout_s=30.0)
        self.limit = BodyLimit(self._answer, limits=limits)
        self.num_read = 0
        self.may_answer = asyncio.Event()
        self.may_end = asyncio.Event()

    @property
    def taken(self) -> int:
        return self.limit._memory.num_taken

    async def _answer(self, scope, receive, send) -> None:
        while (await receive()).get("more_body"):
            pass
        self.num_read += 1
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await self.may_end.wait()
        await send({"type": "http.response.body", "body": b""})

    def post(self, tenant: str, num_bytes: int) -> asyncio.Task[None]:
        pieces = [b"x" * min(65536, num_bytes - at) for at in range(0, num_bytes, 65536)]

        async def receive():
            body = pieces.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(pieces)}

        async def send(message) -> None:
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": TEXT,
            "headers": [(b"content-length", str(num_bytes).encode())],
            "state": {"tenant": tenant},
        }
        return asyncio.create_task(self.limit(scope, receive, send))


async def test_bodies_that_are_not_small_wait_for_room_and_give_it_back_when_the_answer_begins() -> None:
    bodies = Bodies(max_memory_bytes=4 * BODY_COPIES * MIB)
    whale = [bodies.post("whale", MIB) for _ in range(20)]
    await wait_until(lambda: bodies.num_read == 2)
    minnow = bodies.post("minnow", MIB)
    small = bodies.post("whale", 1000)
    await wait_until(lambda: bodies.num_read == 4)
    assert bodies.taken == 3 * BODY_COPIES * MIB, (
        "one tenant takes half of it, and the small body takes nothing"
    )
    bodies.may_answer.set()
    await wait_until(lambda: bodies.num_read == 22)
    assert bodies.taken == 0, "a running stream holds no body"
    bodies.may_end.set()
    await asyncio.gather(*whale, minnow, small)


async def test_a_file_larger_than_a_piece_comes_back_whole(client: httpx.AsyncClient) -> None:
    line = json.dumps({"text": "long " * 20_000}).encode() + b"\n"
    content = line * (CHUNK_BYTES // len(line) + 2)
    files = {"file": ("f.jsonl", content)}
    uploaded = await client.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
    assert uploaded.status_code == 200, uploaded.text
    reply = await client.get(f"/v1/files/{uploaded.json()['id']}/content")
    assert reply.content == content
    assert int(reply.headers["content-length"]) == len(content)
