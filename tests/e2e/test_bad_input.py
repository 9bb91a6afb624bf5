"""Bad input to a running stack: a clear 4xx, and nobody else notices."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tessera.redis import keys
from tests.e2e.conftest import Stack
from tests.e2e.test_openai_client import training_file
from tests.waiting import HANG_S, wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]

#: What is wrong, where to, the body, and what must come back: status, code, param.
BAD_REQUESTS: list[tuple[str, str, dict[str, Any], int, str, str]] = [
    ("unknown model", TEXT, {"model": "nobody"}, 404, "model_not_found", "model"),
    ("unknown version", TEXT, {"model": "nobody@3"}, 404, "model_not_found", "model"),
    ("too long", TEXT, {"prompt": "a " * 5000}, 400, "context_length_exceeded", "prompt"),
    ("negative", CHAT, {"temperature": -1}, 400, "invalid_value", "temperature"),
    ("wrong type", CHAT, {"max_tokens": "7"}, 400, "invalid_value", "max_tokens"),
    ("no messages", CHAT, {"messages": []}, 400, "invalid_value", "messages"),
    ("tools", CHAT, {"tools": [{}]}, 400, "unsupported_parameter", "tools"),
]


@pytest.mark.parametrize("case", BAD_REQUESTS, ids=lambda case: case[0])
def test_a_bad_request_is_a_clear_4xx(stack: Stack, case: tuple[Any, ...]) -> None:
    _, path, wrong, status, code, param = case
    sound = {"messages": HELLO} if path == CHAT else {"prompt": "a"}

    reply = httpx.post(stack.url + path, json={"model": "tiny", **sound, **wrong}, timeout=HANG_S)

    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert error["code"] == code
    assert error["message"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_a_number_that_json_does_not_know_is_refused(stack: Stack, value: str) -> None:
    body = f'{{"model": "tiny", "prompt": "a", "temperature": {value}}}'

    reply = httpx.post(stack.url + TEXT, content=body, headers={"content-type": "application/json"})

    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_a_training_file_with_mistakes_names_every_line(client: openai.OpenAI) -> None:
    content = "\n".join(
        [
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "{not json",
            '{"messages": [{"role": "user", "content": "no answer"}]}',
            '{"messages": [{"role": "robot", "content": "a"}]}',
            '{"prompt": "only"}',
        ]
    )

    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("bad.jsonl", content.encode()), purpose="fine-tune")

    assert caught.value.code == "invalid_training_file"
    for line in (2, 3, 4, 5):
        assert f"line {line}:" in caught.value.message
    assert "line 1:" not in caught.value.message


def test_an_empty_file_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("empty.jsonl", b"\n"), purpose="fine-tune")

    assert caught.value.code == "empty_file"


def test_a_body_over_the_limit_is_refused(stack: Stack) -> None:
    body = b'{"model": "tiny", "prompt": "' + b"a" * (9 << 20) + b'"}'

    reply = httpx.post(stack.url + TEXT, content=body, headers={"content-type": "application/json"})

    assert reply.status_code == 413
    assert reply.json()["error"]["code"]


def test_a_truncated_adapter_fails_only_its_own_request(
    stack: Stack, client: openai.OpenAI, tmp_path: Path
) -> None:
    file = client.files.create(file=training_file(tmp_path, 12), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        hyperparameters={"n_epochs": 1},
        extra_body={"adapter": {"id": "broken"}},
    )
    wait_until_sync(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
    with stack.store() as store:
        key = keys.adapter_blob("default", "broken", 1)
        store.set(key, store.get(key)[:-100])

    def complete(model: str) -> str:
        answer = client.completions.create(model=model, prompt="The program", max_tokens=8, temperature=0)
        return answer.choices[0].text

    alone = complete("tiny")
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        neighbours = [pool.submit(complete, "tiny") for _ in range(4)]
        broken = pool.submit(complete, "broken")
        assert [neighbour.result() for neighbour in neighbours] == [alone] * 4
        with pytest.raises(openai.APIStatusError) as caught:
            broken.result()

    assert 400 <= caught.value.status_code < 500
    assert caught.value.code == "corrupt_record"
