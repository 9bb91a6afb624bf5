"""The official client, unchanged, over a socket."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from redis.asyncio import Redis

from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine
from tests.service.conftest import publish
from tests.service.training import GOOD, run_job

HELLO = [{"role": "user", "content": "hello"}]


async def test_models_can_be_listed_read_and_deleted(
    official: openai.AsyncOpenAI, adapters: AdapterStore
) -> None:
    await publish(adapters, "anna")

    names = [model.id async for model in official.models.list()]

    assert names == ["tiny", "anna"]
    assert (await official.models.retrieve("anna")).owned_by == "default"
    assert (await official.models.delete("anna")).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        await official.models.retrieve("anna")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.request_id


async def test_a_completion_and_a_chat(official: openai.AsyncOpenAI) -> None:
    completion = await official.completions.create(model="tiny", prompt="one two", max_tokens=2, logprobs=1)
    chat = await official.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=1, extra_body={"top_k": 3}
    )

    assert completion.choices[0].text
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 2
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].logprobs is not None
    assert chat.model_extra is not None
    assert chat.model_extra["adapter"] is None


async def test_streams_end_with_a_reason_and_usage(official: openai.AsyncOpenAI) -> None:
    stream = await official.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    *_, last, usage = chunks
    assert last.choices[0].finish_reason in ("length", "stop")
    assert usage.choices == []
    assert usage.usage is not None
    text = await official.completions.create(model="tiny", prompt="one two", max_tokens=4, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in text])


async def test_a_failure_within_a_stream_raises(official: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = ("step_failed", "boom"), 2

    stream = await official.completions.create(model="tiny", prompt="one two", max_tokens=9, stream=True)

    with pytest.raises(openai.APIError, match="gave up"):
        async for _ in stream:
            pass


async def test_files_and_jobs(official: openai.AsyncOpenAI, redis: Redis) -> None:
    file = await official.files.create(file=("data.jsonl", GOOD), purpose="fine-tune")
    assert (await official.files.wait_for_processing(file.id)).status == "processed"
    assert (await official.files.content(file.id)).content == GOOD
    job = await official.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, suffix="devil", extra_body={"adapter": {"rank": 4}}
    )
    await run_job(redis)

    done = await official.fine_tuning.jobs.retrieve(job.id)
    events = [event async for event in official.fine_tuning.jobs.list_events(job.id, limit=1)]
    checkpoints = [c async for c in official.fine_tuning.jobs.checkpoints.list(job.id)]

    assert (done.status, done.trained_tokens) == ("succeeded", 99)
    assert done.fine_tuned_model is not None
    assert done.fine_tuned_model.startswith("devil-")
    assert len(events) >= 2
    assert len(checkpoints) == 1
    assert [j.id async for j in official.fine_tuning.jobs.list(limit=1)] == [job.id]
    assert (await official.files.delete(file.id)).deleted


async def test_lifetimes_orders_and_filters_travel_as_the_client_writes_them(
    official: openai.AsyncOpenAI,
) -> None:
    lifetime: Any = {"anchor": "created_at", "seconds": 3600}
    old = await official.files.create(file=("a.jsonl", GOOD), purpose="fine-tune", expires_after=lifetime)
    new = await official.files.create(file=("b.jsonl", GOOD), purpose="fine-tune")
    jobs = [
        await official.fine_tuning.jobs.create(
            model="tiny",
            training_file=new.id,
            metadata=metadata,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
            extra_body={"hyperparameters": {"learning_rate": 1e-3, "warmup_ratio": 0.1}},
        )
        for metadata in ({"project": "a"}, {"project": "b"}, None)
    ]

    assert (old.expires_at, new.expires_at) == (old.created_at + 3600, None)
    assert [file.id async for file in official.files.list(order="asc", limit=1)] == [old.id, new.id]
    found = official.fine_tuning.jobs.list(metadata={"project": "b"}, limit=1)
    assert [job.id async for job in found] == [jobs[1].id]
    assert jobs[0].hyperparameters.n_epochs == 2
    assert jobs[0].hyperparameters.model_extra is not None
    assert jobs[0].hyperparameters.model_extra["learning_rate"] == 1e-3


async def test_a_job_can_be_cancelled_once(official: openai.AsyncOpenAI) -> None:
    file = await official.files.create(file=("data.jsonl", GOOD), purpose="fine-tune")
    job = await official.fine_tuning.jobs.create(model="tiny", training_file=file.id)

    assert (await official.fine_tuning.jobs.pause(job.id)).status == "paused"
    assert (await official.fine_tuning.jobs.resume(job.id)).status == "queued"
    assert (await official.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        await official.with_options(max_retries=2).fine_tuning.jobs.cancel(job.id)


async def test_errors_have_their_code_and_param(official: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await official.chat.completions.create(model="tiny", messages=HELLO, temperature=9)

    assert (caught.value.code, caught.value.param) == ("invalid_value", "temperature")
    assert "temperature" in caught.value.message
