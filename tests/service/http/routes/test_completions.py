"""POST /v1/completions, not streamed."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from service.generation.text import TextCodec
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine, fake_logprob
from tests.service.conftest import publish
from tests.service.training import BASIS_ID

URL = "/v1/completions"


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await client.post(URL, json={"model": "tiny", **body})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_a_prompt_is_continued(client: httpx.AsyncClient, codec: TextCodec) -> None:
    num_prompt = len(codec.chat.text_ids("The program"))

    answer = await complete(client, prompt="The program", max_tokens=num_prompt)

    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    choice = answer["choices"][0]
    assert choice == {"index": 0, "text": "The program", "logprobs": None, "finish_reason": "length"}
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["completion_tokens"] == num_prompt
    assert answer["usage"]["total_tokens"] == 2 * num_prompt
    assert answer["adapter"] is None
    assert answer["x_tessera"]["max_distinct_in_batch"] == 1
    assert answer["x_tessera"]["ttft_ms"] > 0


async def test_a_field_that_is_not_given_has_openais_default(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await complete(client, prompt="a", temperature=None, n=None, stop=None, stream=None, max_tokens=None)

    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (16, 1.0, 1.0)
    assert (sampling.seed, sampling.logprobs) == (None, None)


async def test_sampling_parameters_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    given = {
        "max_tokens": 9,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 11,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
    }

    await complete(client, prompt="a", logit_bias={"17": -100}, stop_token_ids=[300], **given)

    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert sampling.logit_bias == {17: -100.0}
    assert set(sampling.stop_token_ids) == {300, 6}


async def test_ignore_eos_leaves_only_the_callers_stop_tokens(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await complete(client, prompt="a", ignore_eos=True, stop_token_ids=[300])

    assert engine.requests[0].sampling.stop_token_ids == (300,)


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("one", 1), (["one", "two"], 2), ([300, 301], 1), ([[300], [301, 302]], 2)],
    ids=["text", "texts", "tokens", "token lists"],
)
async def test_a_prompt_has_four_forms(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec, prompt: Any, num_prompts: int
) -> None:
    answer = await complete(client, prompt=prompt, n=2, max_tokens=2)

    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num_prompts))
    sent = [request.token_ids for request in engine.requests]
    assert sent[::2] == sent[1::2]
    assert answer["usage"]["prompt_tokens"] == sum(len(ids) for ids in sent[::2])
    assert answer["usage"]["completion_tokens"] == 2 * 2 * num_prompts


async def test_the_choices_of_one_seeded_prompt_differ(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, prompt="one two three", n=3, seed=5)

    assert sorted(request.sampling.seed or 0 for request in engine.requests) == [5, 6, 7]


async def test_echo_puts_the_prompt_first_with_its_logprobs(
    client: httpx.AsyncClient, codec: TextCodec
) -> None:
    prompt_ids = codec.chat.text_ids("one two")

    answer = await complete(client, prompt="one two", echo=True, logprobs=2, max_tokens=1)

    choice, first = answer["choices"][0], codec.token_text(prompt_ids[0])
    assert choice["text"] == "one two" + first
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [codec.token_text(t) for t in [*prompt_ids, prompt_ids[0]]]
    assert logprobs["token_logprobs"] == [None, *(fake_logprob(t) for t in [*prompt_ids[1:], prompt_ids[0]])]
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["top_logprobs"][1]) == 2
    assert logprobs["text_offset"][-1] == len("one two")
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


async def test_the_prompt_alone_can_be_asked_for(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=[300, 301, 302], echo=True, logprobs=0, max_tokens=0)

    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 3
    assert answer["choices"][0]["logprobs"]["top_logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 0


async def test_a_stop_string_ends_the_text_and_is_no_part_of_it(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    engine.script = lambda request: codec.chat.text_ids("alpha beta gamma delta")

    answer = await complete(client, prompt="a", stop=["ma de", "a g"], max_tokens=50, logprobs=0)

    assert answer["choices"][0]["text"] == "alpha bet"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "".join(answer["choices"][0]["logprobs"]["tokens"]).startswith("alpha bet")
    assert len(engine.cancelled) == 1


async def test_the_end_token_is_no_part_of_the_text(
    client: httpx.AsyncClient, engine: FakeEngine, codec: TextCodec
) -> None:
    engine.script = lambda request: [*codec.chat.text_ids("yes"), 6, *codec.chat.text_ids("no")]

    answer = await complete(client, prompt="a", max_tokens=50)

    assert answer["choices"][0]["text"] == "yes"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert engine.cancelled == []


async def test_an_adapter_is_named_by_the_caller_and_in_the_answer(
    client: httpx.AsyncClient, engine: FakeEngine, adapters: AdapterStore
) -> None:
    await publish(adapters, "anna")
    await publish(adapters, "anna")
    for name, version in (("anna", 2), ("anna@1", 1), ("tiny:anna", 2)):
        answer = await complete(client, model=name, prompt="a")

        assert answer["model"] == name
        assert answer["adapter"] == {"id": "anna", "version": version}
        ref = engine.requests[-1].adapter
        assert ref is not None
        assert (ref.tenant, ref.adapter_id, ref.version, ref.basis_id) == (
            "default",
            "anna",
            version,
            BASIS_ID,
        )


async def test_cached_prompt_tokens_are_reported(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.num_cached_tokens = 3

    answer = await complete(client, prompt=[300, 301, 302, 303], n=2)

    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_a_long_prompt_is_tokenised_off_the_event_loop(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    reply = await client.post(URL, json={"model": "tiny", "prompt": "word " * 60_000})

    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
