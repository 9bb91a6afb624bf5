"""Bad requests to the generation endpoints: a clear answer in one shape, and never a 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from adapter_core.errors import EngineOverloaded
from service.middleware import UPLOAD_PATH
from tests.fakes import FakeEngine
from tests.http.conftest import MakeApp, client_of, served

TEXT, CHAT, SCORE, JOBS = "/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/fine_tuning/jobs"
HELLO = [{"role": "user", "content": "hello"}]
SOUND: dict[str, dict[str, Any]] = {
    TEXT: {"model": "tiny", "prompt": "a"},
    CHAT: {"model": "tiny", "messages": HELLO},
    SCORE: {"model": "tiny", "input": [{"text": "one two"}]},
    JOBS: {"model": "tiny", "training_file": "file-" + "0" * 24},
}

#: Where, what is put into a sound body, and the code and param that must come back with 400.
INVALID: list[tuple[str, dict[str, Any], str, str]] = [
    (TEXT, {"temperature": 2.1}, "invalid_value", "temperature"),
    (TEXT, {"temperature": False}, "invalid_value", "temperature"),
    (TEXT, {"top_p": 0}, "invalid_value", "top_p"),
    (TEXT, {"top_k": -2}, "invalid_value", "top_k"),
    (TEXT, {"min_p": 1.5}, "invalid_value", "min_p"),
    (TEXT, {"n": 0}, "invalid_value", "n"),
    (TEXT, {"n": 17}, "invalid_value", "n"),
    (TEXT, {"n": True}, "invalid_value", "n"),
    (TEXT, {"max_tokens": "7"}, "invalid_value", "max_tokens"),
    (TEXT, {"max_tokens": 1.5}, "invalid_value", "max_tokens"),
    (TEXT, {"max_tokens": 10**18}, "context_length_exceeded", "prompt"),
    (TEXT, {"max_tokens": 10**30}, "invalid_value", "max_tokens"),
    (TEXT, {"max_tokens": 0}, "invalid_value", "max_tokens"),
    (TEXT, {"max_tokens": 256}, "context_length_exceeded", "prompt"),
    (TEXT, {"min_tokens": 17}, "invalid_value", "min_tokens"),
    (TEXT, {"logprobs": 21}, "invalid_value", "logprobs"),
    (TEXT, {"seed": 2**63}, "invalid_value", "seed"),
    (TEXT, {"stop": ["x"] * 17}, "invalid_value", "stop"),
    (TEXT, {"stop": [""]}, "invalid_value", "stop.0"),
    (TEXT, {"stop": "x" * 257}, "invalid_value", "stop"),
    (TEXT, {"stop": 7}, "invalid_value", "stop"),
    (TEXT, {"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    (TEXT, {"logit_bias": {"8192": 1}}, "invalid_value", "logit_bias"),
    (TEXT, {"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5"),
    (TEXT, {"stop_token_ids": [8192]}, "invalid_value", "stop_token_ids"),
    (TEXT, {"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    (TEXT, {"prompt": []}, "invalid_value", "prompt"),
    (TEXT, {"prompt": [[]]}, "invalid_value", "prompt.0"),
    (TEXT, {"prompt": [1, "a"]}, "invalid_value", "prompt.1"),
    (TEXT, {"prompt": ["a", 1]}, "invalid_value", "prompt.1"),
    (TEXT, {"prompt": [8192]}, "invalid_value", "prompt"),
    (TEXT, {"prompt": [-1]}, "invalid_value", "prompt"),
    (TEXT, {"prompt": {}}, "invalid_value", "prompt"),
    (TEXT, {"prompt": None}, "invalid_value", "prompt"),
    (TEXT, {"prompt": "word " * 300}, "context_length_exceeded", "prompt"),
    (TEXT, {"prompt": ["a"] * 256, "n": 2}, "invalid_value", "prompt"),
    (TEXT, {"model": 7}, "invalid_value", "model"),
    (TEXT, {"model": "m" * 300}, "invalid_value", "model"),
    (TEXT, {"best_of": 3}, "unsupported_parameter", "best_of"),
    (TEXT, {"suffix": "end"}, "unsupported_parameter", "suffix"),
    (TEXT, {"guided_json": {"type": "object"}}, "unsupported_parameter", "guided_json"),
    (CHAT, {"messages": []}, "invalid_value", "messages"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, "missing_required_parameter", "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "invalid_value", "messages.0.content"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
        "invalid_value",
        "messages.0.content.0.type",
    ),
    (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
     "unsupported_parameter", "tool_calls"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 300}]}, "context_length_exceeded", "messages"),
    (CHAT, {"max_tokens": 0}, "invalid_value", "max_tokens"),
    (CHAT, {"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    (CHAT, {"logprobs": 1}, "invalid_value", "logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
    (CHAT, {"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
    (CHAT, {"functions": [{}]}, "unsupported_parameter", "functions"),
    (CHAT, {"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    (CHAT, {"modalities": ["audio"]}, "unsupported_parameter", "modalities"),
    (CHAT, {"audio": {"voice": "x"}}, "unsupported_parameter", "audio"),
    (SCORE, {"input": []}, "invalid_value", "input"),
    (SCORE, {"input": [{"text": "a b"}] * 65}, "invalid_value", "input"),
    (SCORE, {"input": [{"text": ""}]}, "invalid_value", "input.0.text"),
    (SCORE, {"input": [{"prompt": "a"}]}, "missing_required_parameter", "input.0.completion"),
    (SCORE, {"input": [{"text": "a b"}, {"text": "word " * 300}]}, "context_length_exceeded", "input.1"),
    (SCORE, {"input": [{"messages": HELLO}]}, "nothing_trained", "input.0"),
    (SCORE, {"extra": 1}, "unknown_parameter", "extra"),
    (JOBS, {"hyperparameters": {"n_epochs": "many"}}, "invalid_value", "hyperparameters.n_epochs"),
    (JOBS, {"hyperparameters": {"n_epochs": 0}}, "invalid_value", "hyperparameters.n_epochs"),
    (JOBS, {"hyperparameters": {"n_epochs": 1.5}}, "invalid_value", "hyperparameters.n_epochs"),
    (JOBS, {"method": {"type": "dpo"}}, "invalid_value", "method.type"),
    (JOBS, {"integrations": [{"type": "wandb"}]}, "unsupported_parameter", "integrations"),
    (JOBS, {"adapter": {"ranks": 4}}, "unknown_parameter", "adapter.ranks"),
    (JOBS, {"adapter": {"rank": 0}}, "invalid_value", "adapter.rank"),
    (JOBS, {"suffix": "x" * 65}, "invalid_value", "suffix"),
    (JOBS, {"metadata": {"a": 1}}, "invalid_value", "metadata.a"),
    (JOBS, {"seed": -1}, "invalid_value", "seed"),
]  # fmt: skip


def check_error(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which must have the one shape."""
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"]
    assert isinstance(error["code"], str)
    return dict(error)


@pytest.mark.parametrize("case", INVALID, ids=lambda case: f"{case[0][4:]} {str(case[1])[:40]}")
async def test_a_wrong_parameter_is_named(
    client: httpx.AsyncClient, engine: FakeEngine, case: tuple[str, dict[str, Any], str, str]
) -> None:
    url, wrong, code, param = case

    error = check_error(await client.post(url, json={**SOUND[url], **wrong}), 400)

    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == "invalid_request_error"
    assert engine.requests == []


async def test_all_problems_are_told_at_once(client: httpx.AsyncClient) -> None:
    wrong = {"temperature": 9, "n": 0, "top_p": 2}

    error = check_error(await client.post(TEXT, json={**SOUND[TEXT], **wrong}), 400)

    assert all(name in error["message"] for name in wrong)


async def test_a_missing_parameter_is_named(client: httpx.AsyncClient) -> None:
    error = check_error(await client.post(TEXT, json={"prompt": "a"}), 400)

    assert (error["code"], error["param"]) == ("missing_required_parameter", "model")


@pytest.mark.parametrize(
    "model",
    [
        "nobody",
        "nobody@1",
        "tiny@1",
        "a/b",
        "..",
        "",
        "a\x00b",
        "аnna",
        "a\u202eb",
        "Anna",
        "anna@x",
        "anna@0",
    ],
    ids=ascii,
)
async def test_an_unknown_model_is_404(client: httpx.AsyncClient, model: str) -> None:
    error = check_error(await client.post(TEXT, json={**SOUND[TEXT], "model": model}), 404)

    assert (error["code"], error["param"]) == ("model_not_found", "model")


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


async def test_request_ids_are_taken_over_only_if_they_are_sane(client: httpx.AsyncClient) -> None:
    async def id_for(inbound: str) -> str:
        return (await client.get("/version", headers={"x-request-id": inbound})).headers["x-request-id"]

    assert await id_for("abc-123") == "abc-123"
    assert (await id_for("a b")).startswith("req_")
    assert (await id_for("x" * 200)).startswith("req_")


async def _large() -> AsyncIterator[bytes]:
    """Sent in chunks, so that nothing says how long it is."""
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


async def test_a_body_that_says_it_is_too_large_is_not_read(make_app: MakeApp) -> None:
    async with client_of(make_app(max_body_bytes=1024)) as client:
        reply = await client.post(TEXT, json={**SOUND[TEXT], "prompt": "a" * 2000})

    check_error(reply, 413)


async def test_a_body_that_does_not_come_is_408(make_app: MakeApp) -> None:
    async with served(make_app(body_timeout_s=0.1)) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: 100\r\n\r\n{")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()

    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"body_timeout"' in answer
