"""Fields that well-known clients send by themselves: all of them are accepted.

The payloads were recorded or read off: openai 3.57, langchain-openai 1.7, lm-eval 0.4, guidellm 0.8, aiperf
0.13, vLLM's and SGLang's serving benchmarks, and the defaults that a vLLM client fills in. litellm 1.110,
pydantic-ai 2.68, openai-agents 0.24, llama-index-llms-openai-like 0.8, haystack 3.4, smolagents 1.26,
inspect-ai 0.3 and the AI SDK 6 send no field that does not stand in one of these.
"""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.fakes import FakeEngine
from tests.service.answers import CHAT, TEXT

PARTS = [{"type": "text", "text": "hello there"}]
USAGE = {"include_usage": True}
EVERY_CHUNK = {"include_usage": True, "continuous_usage_stats": True}
#: Requests of a client that sends every field, whether it was given or not.
DEFAULTS: dict[str, Any] = {
    "best_of": None, "use_beam_search": False, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False, "ignore_eos": False,
    "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None, "prompt_logprobs": None, "allowed_token_ids": None, "bad_words": [],
    "frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1, "seed": None, "stop": [],
    "response_format": None, "guided_json": None, "structured_outputs": None, "priority": 0,
    "return_tokens_as_token_ids": None, "return_token_ids": None, "cache_salt": None, "stream_options": None,
    "kv_transfer_params": None, "vllm_xargs": None, "typical_p": 1.0, "no_repeat_ngram_size": 0,
    "lora_path": None, "adapter_id": None, "user": None, "temperature": 1.0, "top_p": 1.0, "stream": False,
}  # fmt: skip
CHAT_DEFAULTS: dict[str, Any] = {
    **DEFAULTS, "logprobs": False, "top_logprobs": 0, "max_tokens": None, "max_completion_tokens": None,
    "tools": None, "tool_choice": "none", "parallel_tool_calls": False, "reasoning_effort": None,
    "include_reasoning": True, "echo": False, "add_generation_prompt": True, "continue_final_message": False,
    "add_special_tokens": False, "documents": None, "chat_template": None, "chat_template_kwargs": None,
    "mm_processor_kwargs": None, "functions": [], "function_call": None, "modalities": None,
    "verbosity": None,
}  # fmt: skip

COMPLETIONS: dict[str, dict[str, Any]] = {
    "lm-eval, log-likelihoods": {"prompt": [[5, 9, 12]], "temperature": 0, "max_tokens": 1, "logprobs": 1,
                                 "seed": 1234, "echo": True},
    "lm-eval, generation": {"prompt": "a", "max_tokens": 4, "temperature": 0, "stop": ["\n\n"], "seed": 1234},
    "langchain": {"prompt": ["hi"], "frequency_penalty": 0, "logprobs": None, "max_tokens": 25, "n": 1,
                  "presence_penalty": 0, "seed": None, "temperature": 0.7, "top_p": 1},
    "vllm bench": {"prompt": "hi", "repetition_penalty": 1.0, "max_tokens": 3, "logprobs": None,
                   "stream": True, "stream_options": USAGE, "ignore_eos": True},
    "sglang bench": {"prompt": "hi", "temperature": 0.0, "best_of": 1, "max_tokens": 3, "stream": True,
                     "ignore_eos": True, "stream_options": USAGE},
    "guidellm": {"prompt": "hi", "stream": True, "stream_options": EVERY_CHUNK, "max_tokens": 3, "stop": None,
                 "ignore_eos": True},
    "all defaults": {"prompt": "hi", "max_tokens": 16, "logprobs": None, "echo": False, "suffix": None,
                     "add_special_tokens": True, **DEFAULTS},
}  # fmt: skip
CHATS: dict[str, dict[str, Any]] = {
    "lm-eval": {"messages": [{"role": "user", "content": "hi", "type": "text"}], "max_tokens": 4,
                "temperature": 0, "stop": [], "seed": 1234},
    "langchain": {"messages": [{"content": "s", "role": "system"},
                               {"content": "hi", "name": "bob", "role": "user"},
                               {"content": "yes", "role": "assistant"}, {"content": PARTS, "role": "user"}],
                  "stream": False, "max_completion_tokens": 5, "temperature": 0.0},
    "vllm bench": {"messages": [{"role": "user", "content": PARTS}], "max_completion_tokens": 3,
                   "stream": True, "stream_options": USAGE, "ignore_eos": True},
    "guidellm": {"messages": [{"role": "user", "content": PARTS}], "stream": True,
                 "stream_options": EVERY_CHUNK, "max_completion_tokens": 3, "stop": None, "ignore_eos": True},
    "aiperf": {"messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": USAGE,
               "max_completion_tokens": 3, "min_tokens": 3, "ignore_eos": True},
    "web interfaces": {"messages": [{"role": "user", "content": "hi"}], "stream": True,
                       "stream_options": USAGE, "user": "u-1",
                       "metadata": {"chat_id": "x"}, "store": False, "max_tokens": 9},
    "openai's parse, second turn": {"messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "tool_calls": None, "parsed": {"x": 1}},
        {"role": "user", "content": "hi"}]},
    "caching": {"messages": [{"role": "user", "content": [{**PARTS[0], "cache_control": {"type": "x"}}]}],
                "prompt_cache_key": "k", "prompt_cache_retention": "24h", "service_tier": "auto"},
    "all defaults": {"messages": [{"role": "user", "content": "hi"}], **CHAT_DEFAULTS},
}  # fmt: skip
CASES = [(TEXT, name, body) for name, body in COMPLETIONS.items()]
CASES += [(CHAT, name, body) for name, body in CHATS.items()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0][4:]} {case[1]}")
async def test_a_clients_own_fields_are_let_pass(
    client: httpx.AsyncClient, case: tuple[str, str, dict[str, Any]]
) -> None:
    url, _, body = case

    reply = await client.post(url, json={"model": "tiny", **body})

    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("url", "body", "defaults"),
    [
        (TEXT, {"prompt": "one two"}, COMPLETIONS["all defaults"]),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}]}, CHATS["all defaults"]),
    ],
    ids=["completions", "chat"],
)
async def test_defaults_change_nothing(
    client: httpx.AsyncClient, engine: FakeEngine, url: str, body: dict[str, Any], defaults: dict[str, Any]
) -> None:
    for sent in (body, {**defaults, **body}):
        await client.post(url, json={"model": "tiny", **sent})

    plain, full = engine.requests
    assert (full.token_ids, full.sampling, full.adapter) == (plain.token_ids, plain.sampling, plain.adapter)


async def test_an_answer_of_the_official_client_can_be_sent_back(official: openai.AsyncOpenAI) -> None:
    question: Any = {"role": "user", "content": "hello"}
    answer = await official.chat.completions.create(model="tiny", messages=[question], max_tokens=3)

    back: Any = {**answer.choices[0].message.model_dump(), "parsed": {"x": 1}}  # `parse` adds the last one
    assert {"refusal", "tool_calls", "function_call", "audio", "annotations"} <= back.keys()
    again = await official.chat.completions.create(
        model="tiny", messages=[question, back, question], max_tokens=3, store=False, user="me"
    )

    assert again.choices[0].message.content
