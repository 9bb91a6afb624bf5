"""`chat_template_kwargs` and `reasoning_effort`: variables of the base model's own chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.generation.text import TextCodec
from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL
from tests.fakes import FakeEngine
from tests.service.answers import CHAT, HELLO, SOUND, TEXT, check_error
from tests.service.conftest import MakeApp, client_of

TEMPLATE = """{%- if reasoning_effort is defined %}effort {{ reasoning_effort }} {% endif -%}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt %}assistant:{% if not enable_thinking | default(true) %} at once{% endif %}
{%- if bos_token is defined and tools is defined and max_length is defined %} never{% endif %}{% endif %}"""


@pytest.fixture
def thinker() -> TextCodec:
    """The bundled tokenizer with a template that reads two variables."""
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    tokenizer.chat_template = TEMPLATE
    return TextCodec(tokenizer)


@pytest_asyncio.fixture
async def thinking(make_app: MakeApp, thinker: TextCodec) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(codec=thinker)) as client:
        yield client


def prompt_of(engine: FakeEngine, codec: TextCodec) -> str:
    return codec.decode(engine.requests[-1].token_ids)


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ({}, "user: hello\nassistant:"),
        ({"chat_template_kwargs": None}, "user: hello\nassistant:"),
        ({"chat_template_kwargs": {"enable_thinking": None}}, "user: hello\nassistant:"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "user: hello\nassistant:"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "user: hello\nassistant: at once"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "user: hello\nassistant:"),
        ({"reasoning_effort": "low"}, "effort low user: hello\nassistant:"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, "effort low user: hello\nassistant:"),
    ],
)
async def test_variables_reach_the_template(
    thinking: httpx.AsyncClient, engine: FakeEngine, thinker: TextCodec, given: dict[str, Any], prompt: str
) -> None:
    reply = await thinking.post(CHAT, json={**SOUND[CHAT], "messages": HELLO[:1], **given})

    assert reply.status_code == 200, reply.text
    assert prompt_of(engine, thinker).replace(HELLO[0]["content"], "hello") == prompt


@pytest.mark.parametrize(
    "name",
    [
        "thinking", "tokenize", "return_dict", "messages", "conversation", "tools", "documents",
        "chat_template", "bos_token", "max_length", "continue_final_message", "padding",
        "raise_exception", "range", "",
        "tokenizer_kwargs", "return_tensors", "message", "self",
    ],
)  # fmt: skip
async def test_what_the_template_does_not_read_is_refused(
    thinking: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    body = {**SOUND[CHAT], "chat_template_kwargs": {name: "x"}}

    error = check_error(await thinking.post(CHAT, json=body), 400)

    assert (error["code"], error["param"]) == ("unsupported_parameter", f"chat_template_kwargs.{name}")
    assert "it reads enable_thinking, reasoning_effort" in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (
            {"chat_template_kwargs": {"add_generation_prompt": 0}},
            "chat_template_kwargs.add_generation_prompt",
        ),
        ({"chat_template_kwargs": {"enable_thinking": ["x"]}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": "x" * 129}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"reasoning_effort": "a", "chat_template_kwargs": {"reasoning_effort": "b"}}, "reasoning_effort"),
    ],
)  # fmt: skip
async def test_values_that_cannot_be_meant_are_refused(
    thinking: httpx.AsyncClient, given: dict[str, Any], param: str
) -> None:
    assert check_error(await thinking.post(CHAT, json={**SOUND[CHAT], **given}), 400)["param"] == param


async def test_a_template_without_variables_takes_none(client: httpx.AsyncClient) -> None:
    for given in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        error = check_error(await client.post(CHAT, json={**SOUND[CHAT], **given}), 400)
        assert "it reads none that can be set" in error["message"]
        error = check_error(await client.post(TEXT, json={**SOUND[TEXT], **given}), 400)
        assert (error["code"], error["param"]) == ("unsupported_parameter", *given)
