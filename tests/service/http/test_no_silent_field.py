"""Probe all endpoints: no field is accepted without effect, unless it is documented as ignored.

Each field is sent alone, in every place where users put it. Three outcomes are right: a 400 whose `param` is
the dotted path of the field; a field of the table of ignored ones; an answer, a request to the engine or a
job that differs from what is got without the field.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from service.http.schemas import fields
from tessera.queue.client import JobQueue
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine
from tests.service.answers import CHAT, HELLO, JOBS, SCORE, SOUND, TEXT, check_error
from tests.service.conftest import publish
from tests.service.sse import parse
from tests.service.training import GOOD, upload

#: Fields of other servers, clients and papers, each with a value that requests an effect.
GENERATION: dict[str, Any] = {
    # OpenAI's
    "audio": {"voice": "x"}, "best_of": 3, "echo": True, "frequency_penalty": 1.5, "function_call": "auto2",
    "functions": [{"name": "f"}], "logit_bias": {"5": 3}, "logprobs": 2, "max_completion_tokens": 3,
    "max_tokens": 3, "metadata": {"a": "b"}, "modalities": ["audio"], "moderation": {"model": "m"}, "n": 2,
    "parallel_tool_calls": True, "prediction": {"type": "content", "content": "x"}, "presence_penalty": 1.5,
    "prompt_cache_key": "k", "prompt_cache_options": {"mode": "explicit"}, "prompt_cache_retention": "24h",
    "reasoning_effort": "high", "response_format": {"type": "json_object"}, "safety_identifier": "s",
    "seed": 2, "service_tier": "flex", "stop": ["two"], "store": True, "suffix": "x", "temperature": 0,
    "tool_choice": "required", "tools": [{"type": "function"}], "top_logprobs": 2, "top_p": 0.5, "user": "u",
    "verbosity": "low", "web_search_options": {"search_context_size": "low"}, "stream": True,
    "instructions": "x", "input": "x", "max_output_tokens": 5, "reasoning": {"effort": "low"},
    "conversation": "c", "previous_response_id": "r", "truncation": "auto", "include": ["x"], "timeout": 3,
    # vLLM's
    "add_generation_prompt": False, "add_special_tokens": "x", "allowed_token_ids": [5], "bad_words": ["a"],
    "cache_salt": "s", "chat_template": "{{ 1 }}", "chat_template_kwargs": {"enable_thinking": False},
    "continue_final_message": True, "documents": [{"text": "x"}], "guided_choice": ["a"],
    "guided_decoding_backend": "x", "guided_grammar": "x", "guided_json": {"type": "object"},
    "guided_regex": "a+", "guided_whitespace_pattern": "x", "ignore_eos": True,
    "include_reasoning": False, "include_stop_str_in_output": True, "kv_transfer_params": {"a": 1},
    "length_penalty": 0.5, "logits_processors": ["x"], "min_p": 0.5, "min_tokens": 2, "priority": 3,
    "prompt_embeds": "x", "prompt_logprobs": 1, "repetition_detection": {"max": 1}, "repetition_penalty": 2.0,
    "request_id": "r", "return_token_ids": True, "return_tokens_as_token_ids": True, "session_id": "s",
    "skip_special_tokens": False, "spaces_between_special_tokens": False, "stop_token_ids": [7],
    "stream_interval": 5, "structural_tag": "x", "structured_outputs": {"regex": "a"},
    "thinking_token_budget": 5, "top_k": 3, "truncate_prompt_tokens": 1, "truncation_side": "left",
    "use_beam_search": True, "vllm_xargs": {"a": 1}, "watermarking": True,
    # SGLang's
    "custom_logit_processor": "x", "custom_params": {"a": 1}, "data_parallel_rank": 0, "ebnf": "x",
    "extra_key": "x", "json_schema": "{}", "lora_path": "anna", "no_stop_trim": True, "regex": "a+",
    "return_hidden_states": True, "rid": "r", "separate_reasoning": True, "session_params": {"id": "s"},
    "stop_regex": "a", "stream_reasoning": False,
    # LoRAX's and text-generation-inference's
    "adapter_id": "anna", "adapter_source": "hub", "api_token": "t", "decoder_input_details": True,
    "details": True, "do_sample": True, "grammar": {"type": "regex"}, "inputs": "x", "max_new_tokens": 3,
    "merged_adapters": {"ids": ["a"]}, "parameters": {"top_k": 1}, "return_full_text": True,
    "return_k_alternatives": 2, "truncate": 3, "typical_p": 0.5, "watermark": True,
    # Those of transformers, llama.cpp, Ollama and others.
    "dry_multiplier": 0.8, "early_stopping": True, "enable_thinking": False, "encoder_repetition_penalty": 2,
    "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "format": "json", "guidance_scale": 2, "keep_alive": 5,
    "max_length": 5, "min_length": 5, "mirostat": 2, "n_predict": 5, "n_probs": 2, "negative_prompt": "x",
    "no_repeat_ngram_size": 2, "num_beams": 4, "num_ctx": 64, "num_predict": 3, "num_return_sequences": 2,
    "options": {"top_k": 1}, "penalty_alpha": 0.5, "repeat_last_n": 3, "repeat_penalty": 2.0,
    "samplers": ["x"], "smoothing_factor": 0.5, "stop_sequences": ["a"], "system": "x", "tfs_z": 0.5,
    "thinking": True, "top_a": 0.5, "typical": 0.5, "xtc_probability": 0.5, "extra_body": {"top_k": 1},
    "extra_headers": {"a": "b"},
    "extra_query": {"a": "b"}, "fallbacks": ["x"], "provider": {"only": ["x"]}, "models": ["x"],
    "drop_params": True, "lora_request": {"name": "anna"}, "lora_name": "anna", "adapter": {"id": "anna"},
    "n_epochs": 3, "dry_run": True, "temprature": 0.5, "Temperature": 0.5, "max-tokens": 5, "": 1, 
    "a.b[c]": 1,
}  # fmt: skip

HYPERPARAMETERS: dict[str, Any] = {
    "n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 2.0, "learning_rate": 1e-3, "warmup": 0.1,
    "warmup_ratio": 0.1, "warmup_steps": 10, "weight_decay": 0.1, "lr_scheduler_type": "linear",
    "lr_scheduler": "linear", "max_length": 64, "max_seq_length": 64, "beta": 0.1, "optim": "adamw",
    "gradient_accumulation_steps": 4, "packing": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
    "target_modules": ["q_proj"], "seed": 3, "num_train_epochs": 3, "epochs": 3, "max_steps": 10,
    "per_device_train_batch_size": 4, "context_length": 64, "prompt_loss_weight": 0.1, "max_grad_norm": 1.0,
    "eval_interval": 5, "compute_multiplier": 2, "reasoning_effort": "low", "n_epoch": 3,
    "num_epochs": 3, "micro_batch_size": 4, "lr": 1e-3, "cosine_min_lr_ratio": 0.2, "min_lr_ratio": 0.2,
    "optimizer": "adamw", "momentum": 0.9, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6,
    "validation_split": 0.2, "val_set_size": 0, "load_best_model_at_end": False, "publish": "last",
    "sequence_len": 64, "cutoff_len": 64, "optim_args": "momentum=0.9", "lr_scheduler_kwargs": {"a": 1},
}  # fmt: skip

JOB_FIELDS: dict[str, Any] = {
    **HYPERPARAMETERS, "suffix": "mine", "metadata": {"a": "b"}, "early_stopping": {"patience": 5},
    "integrations": [{"type": "wandb"}], "dry_run": True, "webhook": "http://x", "webhook_url": "http://x",
    "priority": "high", "name": "x", "callbacks": [], "adapter_id": "anna", "lora_path": "anna", "rank": 8,
    "lora": True, "basis": "lora_xs", "form": "lora", "user": "u", "store": True, "extra_body": {"a": 1},
    "parent": "x", "base_model": "tiny", "test_file": "x", "checkpoint": "x", "n_checkpoints": 3,
    "train_on_inputs": True, "training_type": {"type": "Lora"}, "wandb_api_key": "x", "idempotency_key": "x",
}  # fmt: skip

MESSAGE_FIELDS: dict[str, Any] = {
    "tool_calls": [{"id": "x"}], "function_call": {"name": "x"}, "tool_call_id": "x", "audio": {"id": "x"},
    "refusal": "no", "annotations": [{"type": "url_citation"}], "reasoning": "x", "reasoning_content": "x",
    "cache_control": {"type": "ephemeral"}, "type": "image", "prefix": True, "weight": 0, "images": ["x"],
    "id": "x", "timestamp": 3, "metadata": {"a": "b"}, "attachments": ["x"], "partial": True, "foo": 1,
}  # fmt: skip

STREAM_OPTIONS: dict[str, Any] = {
    "include_usage": True, "include_obfuscation": True, "continuous_usage_stats": True,
    "include_logprobs": True, "foo": 1,
}  # fmt: skip

ADAPTER_FIELDS = {
    "ranks": 4,
    "alpha": 8,
    "dropout": 0.1,
    "base": "tiny",
    "version": 3,
    "target_modules": ["q_proj"],
    "scale": 2.0,
    "use_rslora": True,
    "r": 8,
    "lora_alpha": 8,
    "lora_target_modules": "all-linear",
    "lora_dropout": 0.1,
    "modules_to_save": ["lm_head"],
}

ANNA = "anna"


def placed(body: dict[str, Any], path: str, name: str, value: Any) -> dict[str, Any]:
    """`body` with the field in the object at the dotted path, which is created if it is missing."""
    body = copy.deepcopy(body)
    spot: Any = body
    for part in path.split(".") if path else []:
        spot = spot[int(part)] if isinstance(spot, list) else spot.setdefault(part, {})
    spot[name] = value
    return body


Seen = Callable[[httpx.Response], Awaitable[Any]]


async def probe(
    client: httpx.AsyncClient,
    url: str,
    sound: dict[str, Any],
    path: str,
    probes: dict[str, Any],
    *,
    ignored: set[str],
    seen: Seen,
) -> list[str]:
    """The fields that were accepted without effect."""
    plain = await client.post(url, json=sound)
    assert plain.status_code == 200, plain.text
    without = await seen(plain)
    silent = []
    for name, value in probes.items():
        reply = await client.post(url, json=placed(sound, path, name, value))
        if reply.status_code == 400:
            param = check_error(reply, 400)["param"]
            dotted = f"{path}.{name}" if path else name
            assert param == dotted or str(param).startswith(f"{dotted}."), (param, dotted)
            continue
        assert reply.status_code in (200, 404), (name, reply.text)
        effect = reply.status_code == 404 or await seen(reply) != without
        if not effect and name not in ignored:
            silent.append(name)
        assert not (effect and name in ignored), f"{name} is documented as ignored"
    return silent


@pytest.fixture
def seen_by_engine(engine: FakeEngine) -> Seen:
    """The engine's requests since the last look, and the responses, without ids and times."""

    async def look(reply: httpx.Response) -> Any:
        asked = [dataclasses.replace(request, request_id="") for request in engine.requests]
        engine.requests.clear()
        is_stream = reply.headers["content-type"].startswith("text/event-stream")
        answers = parse(reply.text)[:-1] if is_stream else [reply.json()]
        return asked, [
            {k: v for k, v in a.items() if k not in ("id", "created", "x_tessera")} for a in answers
        ]

    return look


@pytest_asyncio.fixture
async def anna(adapters: AdapterStore) -> str:
    await publish(adapters, ANNA)
    return ANNA


WORDS = {"stop": ["three"], "messages": [{"role": "user", "content": "one two three"}]}
PLACES: list[tuple[str, dict[str, Any], str, dict[str, Any], set[str]]] = [
    (
        TEXT,
        {"max_tokens": 8, "prompt": "<|user|>one two three", "stop": ["three"]},
        "",
        GENERATION,
        set(fields.GENERATION_IGNORED),
    ),
    (CHAT, WORDS, "", GENERATION, set(fields.GENERATION_IGNORED)),
    (CHAT, {"max_tokens": 8}, "messages.0", MESSAGE_FIELDS, set(fields.MESSAGE_IGNORED)),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "messages.0.content.0",
        {"cache_control": {"type": "x"}, "annotations": [], "detail": "low", "image_url": "x", "id": "x"},
        {"cache_control", "annotations"},
    ),
    (TEXT, {"stream": True}, "stream_options", STREAM_OPTIONS, set()),
    (CHAT, {"stream": True}, "stream_options", STREAM_OPTIONS, set()),
    (SCORE, {}, "", {**GENERATION, "weight": 1, "normalize": True}, set()),
    (SCORE, {}, "input.0", {"weight": 1, "user": "u", "completions": "x"}, set()),
    (
        SCORE,
        {"input": [{"messages": [*HELLO, {"role": "assistant", "content": "hello"}]}]},
        "input.0.messages.1",
        {**MESSAGE_FIELDS, "weight": 3},
        set(fields.MESSAGE_IGNORED),
    ),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0][4:]} {place[2]}")
async def test_no_field_of_a_request_to_a_model_is_silent(
    client: httpx.AsyncClient,
    seen_by_engine: Seen,
    anna: str,
    place: tuple[str, dict[str, Any], str, dict[str, Any], set[str]],
) -> None:
    url, more, path, probes, ignored = place

    silent = await probe(
        client, url, {**SOUND[url], **more}, path, probes, ignored=ignored, seen=seen_by_engine
    )

    assert silent == []


@pytest.mark.parametrize(
    ("path", "probes"),
    [
        ("", JOB_FIELDS),
        ("hyperparameters", HYPERPARAMETERS),
        ("method", {"dpo": {"hyperparameters": {}}, "reinforcement": {"grader": {}}, "foo": 1}),
        ("method.supervised", {"foo": 1, "n_epochs": 3, "hyperparams": {}}),
        ("method.supervised.hyperparameters", HYPERPARAMETERS),
        ("adapter", ADAPTER_FIELDS),
        ("adapter.basis", {"foo": 1, "rank": 4}),
        ("adapter.init", {"foo": 1, "scale": 2}),
        ("early_stopping", {"patience": 7, "min_delta": 0.5, "threshold": 1, "metric": "loss"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_no_field_of_a_job_is_silent(
    client: httpx.AsyncClient, redis: Redis, file_id: str, anna: str, path: str, probes: dict[str, Any]
) -> None:
    queue = JobQueue(redis)
    method = {"type": "supervised", "supervised": {}} if path.startswith("method") else None
    basis = {"method": "lora_xs"} if path == "adapter.basis" else None
    init = {"method": "zero"} if path == "adapter.init" else None
    adapter = {"basis": basis, "init": init}
    sound = {"model": "tiny", "training_file": file_id, "seed": 1, "method": method, "adapter": adapter}

    async def look(reply: httpx.Response) -> Any:
        spec = (await queue.get("default", reply.json()["id"])).spec
        return dataclasses.replace(spec, adapter_id="", deletion_count=0)

    given = {name: value for name, value in sound.items() if value is not None}
    given["early_stopping"] = {"patience": 2}
    silent = await probe(client, JOBS, given, path, probes, ignored=set(), seen=look)

    assert silent == []


BASIS_FIELDS = {"foo": 1, "adapter": {}, "model": "tiny", "training_file": "x", "name": "x", "seed": 3,
                "metadata": {"a": "b"}, "options": {"foo": 1}, "dry_run": True}  # fmt: skip


async def test_no_field_of_a_basis_job_or_of_an_adapter_is_silent(
    client: httpx.AsyncClient, anna: str
) -> None:
    for name, value in BASIS_FIELDS.items():
        reply = await client.post("/v1/bases", json={"method": "lora_xs", name: value})
        if name == "metadata":
            assert reply.json()["metadata"] == value
        else:
            assert check_error(reply, 400)["param"] in (name, f"{name}.foo")
    for name in ("name", "metadata", "version", "active"):
        reply = await client.patch(f"/v1/adapters/{anna}", json={"active_version": 1, name: 1})
        assert check_error(reply, 400)["param"] == name


#: Every list and every object that is read or deleted, with the names that its query may have.
READS: list[tuple[str, str, set[str]]] = [
    ("GET", "/v1/models", set()),
    ("GET", "/v1/models/tiny", set()),
    ("DELETE", "/v1/models/anna", set()),
    ("GET", "/v1/files", {"after", "limit", "purpose", "order"}),
    ("GET", "/v1/files/FILE", set()),
    ("GET", "/v1/files/FILE/content", set()),
    ("DELETE", "/v1/files/FILE", set()),
    ("GET", JOBS, {"after", "limit", "metadata[a]"}),
    ("GET", f"{JOBS}/JOB", set()),
    ("GET", f"{JOBS}/JOB/events", {"after", "limit", "stream"}),
    ("GET", f"{JOBS}/JOB/checkpoints", {"after", "limit"}),
    ("POST", f"{JOBS}/JOB/cancel", set()),
    ("POST", f"{JOBS}/JOB/pause", set()),
    ("POST", f"{JOBS}/JOB/resume", set()),
    ("GET", "/v1/adapters", {"after", "limit"}),
    ("GET", "/v1/adapters/anna", set()),
    ("GET", "/v1/adapters/anna/peft", {"version"}),
    ("DELETE", "/v1/adapters/anna", set()),
    ("GET", "/v1/bases", set()),
    ("GET", "/v1/bases/methods", set()),
    ("GET", "/v1/bases/jobs", {"after", "limit", "metadata[a]"}),
]
QUERIES = {
    "after": "x", "limit": "1", "order": "asc", "purpose": "calibration", "metadata[a]": "b", "before": "x",
    "status": "running", "stream": "x", "version": "7", "dry_run": "true", "filter": "x", "page": "2",
    "limits": "3", "metadata.a": "b", "limit[]": "3", "api-version": "1",
}  # fmt: skip


@pytest.mark.parametrize("read", READS, ids=lambda read: f"{read[0]} {read[1]}")
async def test_no_query_parameter_is_silent(
    client: httpx.AsyncClient, file_id: str, anna: str, read: tuple[str, str, set[str]]
) -> None:
    method, url, known = read
    job = (await client.post(JOBS, json={"model": "tiny", "training_file": file_id})).json()["id"]
    url = url.replace("FILE", file_id).replace("JOB", job)

    for name, value in QUERIES.items():
        if name not in known:
            error = check_error(await client.request(method, url, params={name: value}), 400)
            dotted = name.replace("[", ".").replace("]", "")
            assert (error["code"], error["param"]) == ("unknown_parameter", dotted)
    for name in known & {"limit", "order", "purpose", "version"}:
        params = [(name, QUERIES[name]), (name, QUERIES[name])]
        assert check_error(await client.request(method, url, params=params), 400)["param"] == name
    if method != "GET":
        for body, param in (({"dry_run": True}, "dry_run"), ([1], None)):
            error = check_error(await client.request(method, url, json=body), 400)
            assert (error["code"], error["param"]) == ("unknown_parameter", param)


@pytest.mark.parametrize("url", [TEXT, CHAT, SCORE, JOBS, "/v1/bases"])
async def test_fields_in_the_query_of_a_post_are_refused(client: httpx.AsyncClient, url: str) -> None:
    body = SOUND.get(url, {"method": "lora_xs"})

    for name in ("temperature", "model", "dry_run", "stream"):
        error = check_error(await client.post(url, json=body, params={name: "0"}), 400)
        assert (error["code"], error["param"]) == ("unknown_parameter", name)


@pytest.mark.parametrize(
    ("name", "param"),
    [
        ("expires_after", "expires_after"),
        ("expires_after[days]", "expires_after.days"),
        ("metadata", "metadata"),
        ("metadata[a]", "metadata.a"),
        ("filename", "filename"),
        ("format", "format"),
        ("dry_run", "dry_run"),
        ("purposes", "purposes"),
    ],
)
async def test_no_form_field_of_an_upload_is_silent(client: httpx.AsyncClient, name: str, param: str) -> None:
    form = {"purpose": "fine-tune", name: "x"}

    error = check_error(await client.post("/v1/files", files={"file": ("a.jsonl", GOOD)}, data=form), 400)

    assert (error["code"], error["param"]) == ("unknown_parameter", param)
    assert (await client.get("/v1/files")).json()["data"] == []


async def test_a_second_file_in_a_form_is_refused(client: httpx.AsyncClient) -> None:
    twice = [("file", ("a.jsonl", GOOD)), ("file", ("b.jsonl", GOOD))]

    error = check_error(await client.post("/v1/files", files=twice, data={"purpose": "fine-tune"}), 400)

    assert error["param"] == "file"


async def test_no_form_field_of_an_import_is_silent(client: httpx.AsyncClient) -> None:
    parts = {"file": ("a.zip", b"x"), "alpha": ("alpha", b"8")}

    error = check_error(await client.post("/v1/adapters/anna/peft", files=parts), 400)

    assert (error["code"], error["param"]) == ("unknown_parameter", "alpha")


async def test_what_clients_send_by_default_is_let_pass(client: httpx.AsyncClient) -> None:
    """Every neutral value of the tables, and null for every name."""
    for place, url, path in (
        (fields.COMPLETION_NEUTRAL, TEXT, ""),
        (fields.CHAT_NEUTRAL, CHAT, ""),
        (fields.MESSAGE_NEUTRAL, CHAT, "messages.0"),
    ):
        for name, neutral in place.items():
            for value in (None, *neutral.values):
                reply = await client.post(url, json=placed(SOUND[url], path, name, value))
                assert reply.status_code == 200, (name, value, reply.text)
    assert (await upload(client)).status_code == 200


async def test_an_unknown_name_gets_the_nearest_one(client: httpx.AsyncClient) -> None:
    body = {**SOUND[CHAT], "max_completion_token": 3, "xyzzy": 1, "max_new_tokens": 4}

    message = check_error(await client.post(CHAT, json=body), 400)["message"]

    assert "max_completion_token: unknown field; did you mean max_completion_tokens?" in message
    assert "xyzzy: unknown field; did" not in message
    assert "max_new_tokens: not supported; use max_tokens" in message
