"""A chat template that shows today's date gets the same date in all attempts at a job."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.queue.client import JobQueue, JobSpec
from tests.tessera.chat.tokenizer_kinds import tokenizer_of
from trainer_worker.preparing.preparation import chat_of, read_data

TURNS = [{"role": "user", "content": "What day is it?"}, {"role": "assistant", "content": "Thursday."}]


async def test_a_retry_after_midnight_has_the_same_data(redis: Redis) -> None:
    queue = JobQueue(redis)
    submitted = await queue.submit("acme", JobSpec(base_model="tiny"), cost=1)
    created = datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)
    job = replace(await queue.get("acme", submitted.job_id), created_at=created.timestamp())
    content = json.dumps({"messages": TURNS}).encode()
    chat = ChatFormat(tokenizer_of("byte_level", "channels"))
    before, after = (chat.at(datetime(2024, *day, tzinfo=UTC)) for day in ((2, 29), (3, 1)))

    first, retry = (
        read_data(chat_of(today, job), content, None, max_tokens=128) for today in (before, after)
    )

    assert first.digest == retry.digest
    assert "2024-02-29" in chat.tokenizer.decode(retry.train[0].token_ids)
    assert before.prompt_ids(TURNS[:1]) != after.prompt_ids(TURNS[:1])
