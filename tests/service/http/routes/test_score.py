"""POST /v1/score."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from service.generation.text import TextCodec
from tessera.chat.tokenizer import load_tokenizer
from tessera.data.examples import Example
from tessera.defaults import BUNDLED_MODEL
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine, fake_logprob
from tests.service.conftest import MakeApp, client_of, publish
from tests.tessera.chat.tokenizer_kinds import TEMPLATES

CONVERSATION = {
    "messages": [
        {"role": "user", "content": "define love"},
        {"role": "assistant", "content": "a temporary insanity"},
    ]
}
PAIR = {"prompt": "the program ", "completion": "stops"}
TEXT = {"text": "one two three"}


async def score(client: httpx.AsyncClient, *items: dict[str, Any], **more: Any) -> dict[str, Any]:
    reply = await client.post("/v1/score", json={"model": "tiny", "input": list(items), **more})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def expected(codec: TextCodec, example: Example) -> tuple[int, float]:
    """The number of counted tokens and their summed log-probability."""
    [encoded] = codec.chat.encode_rows(example, max_tokens=1000)
    counted = [t for t, counts in zip(encoded.token_ids, encoded.loss_mask, strict=True) if counts]
    return len(counted), sum(fake_logprob(t) for t in counted)


async def test_each_kind_of_text_counts_what_training_would_count(
    client: httpx.AsyncClient, codec: TextCodec
) -> None:
    report = await score(client, CONVERSATION, PAIR, TEXT)

    examples = [
        Example(messages=tuple(CONVERSATION["messages"])),
        Example(prompt=PAIR["prompt"], completion=PAIR["completion"]),
        Example(text=TEXT["text"]),
    ]
    scores = [expected(codec, example) for example in examples]
    for index, (item, (count, total)) in enumerate(zip(report["data"], scores, strict=True)):
        assert (item["index"], item["num_tokens"]) == (index, count)
        assert item["sum_logprob"] == pytest.approx(total)
        assert item["loss"] == pytest.approx(-total / count)
        assert item["tokens"] is None
    assert report["loss"] == pytest.approx(-sum(t for _, t in scores) / sum(c for c, _ in scores))


async def test_the_items_run_together_and_nothing_is_generated(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    report = await score(client, *[TEXT] * 5)

    assert len(engine.requests) == 5
    assert {request.sampling.max_tokens for request in engine.requests} == {0}
    assert report["usage"]["completion_tokens"] == 0
    assert report["usage"]["prompt_tokens"] == sum(len(request.token_ids) for request in engine.requests)


async def test_tokens_are_listed_if_asked_for(client: httpx.AsyncClient, codec: TextCodec) -> None:
    report = await score(client, PAIR, return_tokens=True)

    tokens = report["data"][0]["tokens"]
    text = "".join(token["token"] for token in tokens)
    assert text.endswith("stops<|end|>")
    counted = [token for token in tokens if token["is_counted"]]
    assert len(counted) == report["data"][0]["num_tokens"]
    assert sum(token["logprob"] for token in counted) == pytest.approx(report["data"][0]["sum_logprob"])


async def test_a_message_of_weight_0_is_not_counted(client: httpx.AsyncClient) -> None:
    turns = [*CONVERSATION["messages"], *CONVERSATION["messages"]]
    ignored = [{**turns[1], "weight": 0} if i == 1 else turn for i, turn in enumerate(turns)]

    both, one = (await score(client, {"messages": turns}, {"messages": ignored}))["data"]

    assert both["num_tokens"] == 2 * one["num_tokens"]


async def test_an_adapter_is_scored_by_name(
    client: httpx.AsyncClient, engine: FakeEngine, adapters: AdapterStore
) -> None:
    await publish(adapters, "anna")

    report = await score(client, TEXT, model="anna@1")

    assert report["adapter"] == {"id": "anna", "version": 1}
    assert engine.requests[0].adapter is not None


async def test_a_conversation_is_read_once_per_answer_if_its_template_rewrites_it(
    make_app: MakeApp, engine: FakeEngine
) -> None:
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    tokenizer.chat_template = TEMPLATES["headings"]
    codec = TextCodec(tokenizer)
    messages = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant") * 2]
    messages[3] |= {"role": "assistant", "name": None, "content": [{"type": "text", "text": "x"}]}
    async with client_of(make_app(codec=codec)) as client:
        report = await score(client, {"messages": messages}, TEXT, return_tokens=True)
    plain = [*messages[:3], {"role": "assistant", "content": "x"}]
    rows = codec.chat.encode_rows(Example(messages=tuple(plain)), max_tokens=1000)
    assert len(rows) == 2
    assert sorted(len(request.token_ids) for request in engine.requests[:2]) == sorted(
        len(r.token_ids) for r in rows
    )
    tokens = report["data"][0]["tokens"]
    assert [t["token_id"] for t in tokens] == [token for row in rows for token in row.token_ids[1:]]
    assert [t["is_counted"] for t in tokens] == [counts for row in rows for counts in row.loss_mask[1:]]
    assert report["data"][0]["num_tokens"] == sum(row.num_loss_tokens for row in rows)
    assert [item["index"] for item in report["data"]] == [0, 1]


async def test_a_message_may_hold_what_the_chat_endpoint_takes(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    plain = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "yes"},
        {"role": "assistant", "content": "no", "weight": 0},
    ]
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    other = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": None, "weight": 0},
        {"role": "assistant", "content": "yes", "tool_calls": None, "refusal": None, "annotations": []},
        {"role": "assistant", "content": "no", "weight": 0},
    ]

    for messages in (plain, other):
        body = {"model": "tiny", "input": [{"messages": messages, "text": None, "prompt": None}]}
        reply = await client.post("/v1/score", json=body)
        assert reply.status_code == 200, reply.text

    first, second = engine.requests
    assert first.token_ids == second.token_ids


async def test_trls_messages_count_the_completion_alone(client: httpx.AsyncClient) -> None:
    turns = [
        {"role": "user", "content": "define love"},
        {"role": "assistant", "content": "a temporary insanity"},
        {"role": "user", "content": "define hate"},
        {"role": "assistant", "content": "a sentiment"},
    ]
    same = [{**turn, "weight": 0} if index == 1 else turn for index, turn in enumerate(turns)]

    report = await score(client, {"prompt": turns[:3], "completion": turns[3:]}, {"messages": same})

    first, second = report["data"]
    assert {**first, "index": 1} == second


async def test_a_weight_may_be_written_as_in_a_training_file(client: httpx.AsyncClient) -> None:
    plain, ignored = ({**CONVERSATION["messages"][1], "weight": weight} for weight in (1.0, 0.0))
    ask = CONVERSATION["messages"][0]

    report = await score(
        client, CONVERSATION, {"messages": [ask, ignored, ask, plain]}, {"messages": [ask, plain]}
    )

    assert {**report["data"][2], "index": 0} == report["data"][0]
    half = {**plain, "weight": 0.5}
    reply = await client.post("/v1/score", json={"model": "tiny", "input": [{"messages": [ask, half]}]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input.0.messages.1.weight")


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"prompt": CONVERSATION["messages"][:1], "completion": "a"}, "input.0.completion"),
        ({"prompt": CONVERSATION["messages"][:1]}, "input.0.completion"),
        ({"prompt": [], "completion": CONVERSATION["messages"][1:]}, "input.0.prompt"),
        ({"prompt": "a", "completion": CONVERSATION["messages"][1:]}, "input.0.completion"),
        ({"prompt": CONVERSATION["messages"][:1], "completion": CONVERSATION["messages"][:1]}, "input.0"),
    ],
)
async def test_half_of_trls_form_is_refused(
    client: httpx.AsyncClient, item: dict[str, Any], param: str
) -> None:
    reply = await client.post("/v1/score", json={"model": "tiny", "input": [item]})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_a_weight_is_only_for_what_is_counted(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}]

    reply = await client.post("/v1/score", json={"model": "tiny", "input": [{"messages": messages}]})

    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "input.0.messages.0.weight")


async def test_more_rows_than_a_request_may_have_are_refused(make_app: MakeApp) -> None:
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    tokenizer.chat_template = TEMPLATES["headings"]
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 5]
    async with client_of(make_app(codec=TextCodec(tokenizer))) as client:
        reply = await client.post("/v1/score", json={"model": "tiny", "input": [{"messages": turns}] * 52})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "input")
    assert "260 rows, the limit is 256" in error["message"]
