"""POST /v1/classify."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

from service.engine.wire.messages import NO_HEAD, NOT_GENERATIVE
from service.generation.text import TextCodec
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine
from tests.service.conftest import publish


async def classify(client: httpx.AsyncClient, texts: Any, **more: Any) -> httpx.Response:
    return await client.post("/v1/classify", json={"model": "spam", "input": texts, **more})


@pytest.fixture(autouse=True)
async def spam(adapters: AdapterStore) -> None:
    await publish(adapters, "spam")


async def test_the_answer_has_vllms_shape(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    reply = await classify(client, ["one", {"text_a": "two", "text_b": "three"}])
    assert reply.status_code == 200, reply.text
    report = reply.json()

    expected = [codec.chat.text_ids("one"), codec.chat.text_ids("two\nthree")]
    assert [request.token_ids for request in engine.requests] == expected
    assert all(request.classifies and request.sampling.max_tokens == 0 for request in engine.requests)
    assert (report["object"], report["model"]) == ("list", "spam")
    assert report["id"].startswith("classify-")
    for index, (item, ids) in enumerate(zip(report["data"], expected, strict=True)):
        no = 1 / (1 + math.exp(1 - len(ids)))
        assert item["probs"] == pytest.approx([no, 1 - no])
        assert (item["index"], item["num_classes"]) == (index, 2)
        assert item["label"] == ("no" if len(ids) >= 1 else "yes")
    count = sum(map(len, expected))
    assert report["usage"]["prompt_tokens"] == report["usage"]["total_tokens"] == count
    assert report["usage"]["completion_tokens"] == 0
    assert report["adapter"] == {"id": "spam", "version": 1}


async def test_one_text_needs_no_list(client: httpx.AsyncClient) -> None:
    for text in ("one", {"text_a": "one", "text_b": "two"}):
        reply = await classify(client, text)
        assert [item["index"] for item in reply.json()["data"]] == [0]


async def test_a_regression_answers_with_its_score(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.labels = []
    [item] = (await classify(client, "one two three")).json()["data"]
    [request] = engine.requests
    assert item == {"index": 0, "label": None, "probs": [len(request.token_ids)], "num_classes": 1}


@pytest.mark.parametrize(
    ("texts", "param"),
    [
        ([], "input"),
        ("", "input"),
        (["a", ""], "input.1"),
        ([3], "input.0"),
        ({"text_a": "a"}, "input.text_b"),
        ([{"text_a": "a", "text_b": "b", "label": 1}], "input.0.label"),
        (["a"] * 257, "input"),
    ],
)
async def test_a_wrong_input_is_named(client: httpx.AsyncClient, texts: Any, param: str) -> None:
    reply = await classify(client, texts)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


async def test_a_text_that_is_too_long_is_named(client: httpx.AsyncClient) -> None:
    for text in ("word " * 400, "word " * 400_000):
        reply = await classify(client, ["short", text])
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == "input.1"


async def test_unknown_models_and_fields_are_refused(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/classify", json={"model": "nobody", "input": "a"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    reply = await classify(client, "a", temperature=1)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "temperature")


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("classify", {"input": "a"}, NO_HEAD),
        ("completions", {"prompt": "a"}, NOT_GENERATIVE),
        ("completions", {"prompt": "a", "stream": True}, NOT_GENERATIVE),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}, NOT_GENERATIVE),
        ("score", {"input": [{"text": "a b"}]}, NOT_GENERATIVE),
    ],
)
async def test_an_adapter_of_another_task_is_a_400(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], code: str
) -> None:
    engine.failure, engine.script = (code, "not this adapter"), lambda request: []
    reply = await client.post(f"/v1/{path}", json={"model": "spam", **body})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, code, "model")
