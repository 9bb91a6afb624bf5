"""Wrong parameters get a clear error that names them, and nothing reaches the engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.fakes import FakeEngine
from tests.service.answers import CHAT, HELLO, JOBS, SCORE, SOUND, TEXT, check_error

#: The path, what is put into a valid body, and the code and param that must come back with status 400.
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
    (TEXT, {"logit_bias": {"5": 1, "05": -1}}, "invalid_value", "logit_bias"),
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
     "unsupported_parameter", "messages.1.tool_calls"),
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
    (JOBS, {"method": {"type": "reinforcement"}}, "invalid_value", "method.type"),
    (JOBS, {"method": {"type": "supervised", "dpo": {}}}, "invalid_value", "method.dpo"),
    (JOBS, {"method": {"type": "dpo", "supervised": {}}}, "invalid_value", "method.supervised"),
    (JOBS, {"hyperparameters": {"beta": 0.2}}, "unsupported_parameter", "hyperparameters.beta"),
    *(
        (JOBS, {"method": {"type": "dpo", "dpo": {"hyperparameters": wrong}}}, code,
         f"method.dpo.hyperparameters.{next(iter(wrong))}")
        for wrong, code in (
            ({"beta": 0}, "invalid_value"),
            ({"beta": "strong"}, "invalid_value"),
            ({"loss_type": "orpo"}, "invalid_value"),
            ({"label_smoothing": 0.5}, "invalid_value"),
            ({"label_smoothing": 0.1, "loss_type": "ipo"}, "invalid_value"),
            ({"reference_free": "yes"}, "invalid_value"),
            ({"n_epochs": 0}, "invalid_value"),
            ({"reference_model": "tiny"}, "unknown_parameter"),
        )
    ),
    (JOBS, {"integrations": [{"type": "wandb"}]}, "unsupported_parameter", "integrations"),
    (JOBS, {"adapter": {"ranks": 4}}, "unknown_parameter", "adapter.ranks"),
    (JOBS, {"adapter": {"rank": 0}}, "invalid_value", "adapter.rank"),
    (JOBS, {"suffix": "x" * 65}, "invalid_value", "suffix"),
    (JOBS, {"metadata": {"a": 1}}, "invalid_value", "metadata.a"),
    (JOBS, {"seed": -1}, "invalid_value", "seed"),
]  # fmt: skip


@pytest.mark.parametrize("case", INVALID, ids=lambda case: f"{case[0][4:]} {str(case[1])[:40]}")
async def test_a_wrong_parameter_is_named(
    client: httpx.AsyncClient, engine: FakeEngine, case: tuple[str, dict[str, Any], str, str]
) -> None:
    url, wrong, code, param = case

    error = check_error(await client.post(url, json={**SOUND[url], **wrong}), 400)

    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == "invalid_request_error"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"messages": ["hi"]}, "messages.0: Input should be an object"),
        ({"stream_options": []}, "stream_options: Input should be an object"),
        ({"logit_bias": {"x": 1}}, "logit_bias: the keys must be token ids, such as 42"),
        (
            {"chat_template_kwargs": {"tools": [1]}},
            "chat_template_kwargs.tools: Input should be a string, a number, true, false or null",
        ),
    ],
)
async def test_an_error_says_in_plain_words_what_is_wrong(
    client: httpx.AsyncClient, wrong: dict[str, Any], message: str
) -> None:
    reply = await client.post(CHAT, json={**SOUND[CHAT], **wrong})
    assert reply.json()["error"]["message"] == message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_epochs", "3", "Input should be a number or 'auto'"),
        (
            "lr_scheduler_type",
            "x",
            "Input should be 'auto', 'cosine_with_min_lr', 'cosine', 'linear' or 'constant'",
        ),
    ],
)
async def test_the_error_of_a_field_that_may_be_auto_names_both_kinds(
    client: httpx.AsyncClient, name: str, value: str, message: str
) -> None:
    job = {"model": "tiny", "training_file": "file-x", "hyperparameters": {name: value}}
    reply = await client.post("/v1/fine_tuning/jobs", json=job)
    assert reply.json()["error"]["message"] == f"hyperparameters.{name}: {message}"


async def test_all_problems_are_reported_at_once(client: httpx.AsyncClient) -> None:
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
