"""A reused version number never answers from the weights or the KV blocks of its predecessor.

The store is a real one. The right answer of a request is computed by the merged model alone, from the weights
that the model's name meant when the request was resolved.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from service.engine.adapters.packed_adapter import PackedAdapter, SlotFormat
from service.engine.engine import Engine
from service.engine.process.adapter_fetcher import parse_adapter
from service.engine.settings import EngineConfig
from tessera.errors import NotFound, TesseraError
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.redis import keys
from tessera.redis.client import connect
from tessera.store.adapters import AdapterStore
from tests.service.engine.driver import GREEDY, Answer, Driver
from tests.service.engine.models import Served, family

TENANT = "default"
NUM_TOKENS = 4
PROMPTS = family("llama").prompts(17, 26)
PROMPTS.append([*PROMPTS[1][:16], 7, 8])  # has a common prefix


@functools.cache
def right_answer(content: int, prompt: int) -> list[int]:
    served = family("llama")
    return served.oracle(served.refs[content], PROMPTS[prompt], NUM_TOKENS)[0]


def content_of(number: int) -> Adapter:
    served = family("llama")
    return served.adapters[served.refs[number]]


# The same reference, as if no store reported what a version holds


def test_after_an_unload_nothing_of_the_adapter_is_found(llama: Served, start: Callable[..., Driver]) -> None:
    driver = start(llama)
    ref, other = llama.refs[:2]
    prompt = llama.prompts(40)[0]
    driver.submit(prompt, adapter=ref)
    driver.submit(prompt, adapter=other)
    driver.submit(prompt)
    driver.run()
    cached = driver.engine.stats().kv_blocks_cached
    driver.engine.unload(ref.tenant, ref.adapter_id)
    assert driver.engine.stats().kv_blocks_cached == cached - 6  # 51 tokens with KV, in blocks of 8
    driver.adapters[ref] = llama.adapters[other]
    answers = [driver.submit(prompt, adapter=name) for name in (ref, other, None)]
    driver.run()
    assert answers[0].token_ids == answers[1].token_ids == llama.oracle(other, prompt, 12)[0]
    assert [answer.last.num_cached_tokens for answer in answers] == [0, 32, 32]


@pytest.mark.parametrize("lookahead", ["on", "off"])
@pytest.mark.parametrize("steps", [1, 3, 9])
def test_requests_in_flight_keep_what_was_unloaded_and_later_ones_do_not_get_it(
    llama: Served, start: Callable[..., Driver], steps: int, lookahead: str
) -> None:
    driver = start(llama, lookahead=lookahead, num_slots=2, num_blocks=20)
    ref, other = llama.refs[:2]
    prompt = llama.prompts(33)[0]
    long = replace(GREEDY, max_tokens=24)
    before = driver.submit(prompt, long, adapter=ref)
    driver.fetch()
    for _ in range(steps):
        driver.step()
    driver.engine.unload(ref.tenant, ref.adapter_id)
    driver.adapters[ref] = llama.adapters[other]
    after = [driver.submit(prompt, long, adapter=ref) for _ in range(2)]  # 8 blocks each: they preempt
    driver.run()
    again = driver.submit(prompt, long, adapter=ref)
    driver.run()
    assert before.token_ids == llama.oracle(ref, prompt, 24)[0]
    right = llama.oracle(other, prompt, 24)[0]
    assert [answer.token_ids for answer in (*after, again)] == [right] * 3
    assert after[0].last.num_cached_tokens == 0
    assert driver.engine.stats().slots_resident == 1


# Through a store in which anything may happen to a version number


@dataclass
class SentRequest:
    """A request in flight or answered. content: what its name meant. num_changes: how often the store had
    changed by then, or by the read of its adapter that was running already, if it shares the failure of that
    read."""

    answer: Answer
    content: int
    prompt: int
    num_changes: int


class World:
    """A store, an engine, and what each name means. It can hold back what is being fetched for the engine."""

    def __init__(self, redis: Redis, engine: Engine) -> None:
        self.redis, self.store, self.engine = redis, AdapterStore(redis), engine
        self.driver = Driver(engine)
        self.meaning: dict[str, dict[int, int]] = {"a": {}, "b": {}}  # version → content
        self.active: dict[str, int] = {}
        self.requests: list[SentRequest] = []
        self.num_changes = 0
        self._on_the_way: list[tuple[AdapterRef, PackedAdapter | TesseraError, int]] = []
        self._saved: tuple[dict[bytes, bytes], dict[str, dict[int, int]], dict[str, int]] | None = None

    async def act(self, action: str, name: str, number: int) -> None:
        versions = self.meaning[name]
        match action:
            case "publish":
                version = await self.store.publish(TENANT, name, content_of(number), dtype=torch.float32)
                versions[version.version] = number
                self.active[name] = version.version
            case "delete" | "delete unheard":
                if await self.store.delete(TENANT, name) and action == "delete":
                    self.engine.unload(TENANT, name)
                versions.clear()
                self.active.pop(name, None)
            case "come again":  # under the same number, because nothing remembers the first one
                await self.act("delete unheard", name, 0)
                await self.act("expire", name, 0)
                await self.act("publish", name, number)
            case "expire":
                await self.redis.delete(keys.adapter_tombstone(TENANT, name))
            case "roll back" if number in versions:
                await self.store.activate(TENANT, name, number)
                self.active[name] = number
            case "roll back in an earlier release" if number in versions:
                await self.redis.hset(keys.adapter_record(TENANT, name), "active", str(number))
                self.active[name] = number
            case "written by an earlier release":
                await self.redis.hdel(keys.adapter_record(TENANT, name), "checksum")
            case "save":
                content = {key: await self.redis.dump(key) async for key in self.redis.scan_iter()}
                self._saved = content, {n: dict(v) for n, v in self.meaning.items()}, dict(self.active)
            case "restore" if self._saved is not None:
                await self.redis.flushall()
                for key, value in self._saved[0].items():
                    await self.redis.restore(key, 0, value)
                self.meaning = {n: dict(v) for n, v in self._saved[1].items()}
                self.active = dict(self._saved[2])
            case "ask":
                await self._ask(name, number, self.active.get(name))
            case "ask for a version":
                await self._ask(name, number, number, version=number)
            case "read":
                await self._read()
            case "provide":
                self._provide()
            case "cancel" if self.requests:
                self.engine.cancel(self.driver.id_of(self.requests[-1].answer))
            case "step":
                if self.engine.has_work:
                    self.driver.step()
        self.num_changes += action in ("publish", "delete", "delete unheard", "restore")

    async def _ask(self, name: str, number: int, expected: int | None, version: int | None = None) -> None:
        content = None if expected is None else self.meaning[name].get(expected)
        try:
            ref = await self.store.resolve(TENANT, name, version)
        except NotFound:
            assert content is None
            return
        assert content is not None
        prompt = number % len(PROMPTS)
        answer = self.driver.submit(PROMPTS[prompt], replace(GREEDY, max_tokens=NUM_TOKENS), ref)
        reads = [num_changes for on_the_way, _, num_changes in self._on_the_way if on_the_way == ref]
        self.requests.append(SentRequest(answer, content, prompt, min(reads, default=self.num_changes)))

    async def _read(self) -> None:
        refs = self.engine.missing_adapters()
        found = zip(refs, await self.store.fetch(refs), strict=True)
        self._on_the_way += [
            (ref, parse_adapter(ref, blob, SlotFormat(torch.float32)), self.num_changes)
            for ref, blob in found
        ]

    def _provide(self) -> None:
        for ref, adapter, _ in self._on_the_way:
            self.engine.provide_adapter(ref, adapter)
        self._on_the_way.clear()

    async def finish(self) -> None:
        while True:
            await self._read()
            self._provide()
            if not self.engine.has_work:
                break
            self.driver.step()
        for request in self.requests:
            reason = request.answer.finish_reason
            if reason == "length":
                assert request.answer.token_ids == right_answer(request.content, request.prompt)
            elif reason != "cancelled":
                assert request.answer.error_code in ("model_not_found", "adapter_replaced")
                assert self.num_changes > request.num_changes


CROWDED = EngineConfig(num_blocks=24, block_size=8, num_slots=2, max_batch_seqs=4, host_cache_bytes=10_000)
ACTIONS = (
    *("ask", "step", "read", "provide") * 3,
    *("publish", "come again", "restore") * 2,
    *("ask for a version", "delete", "delete unheard", "expire", "save", "restore", "roll back"),
    *("roll back in an earlier release", "written by an earlier release", "cancel"),
)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(ACTIONS), st.sampled_from("aab"), st.integers(0, 3)),
        min_size=40,
        max_size=80,
    )
)
def test_no_answer_is_of_another_content_than_the_name_meant(
    redis_url: str, actions: list[tuple[str, str, int]]
) -> None:
    asyncio.run(_live_through(redis_url, actions))


async def _live_through(url: str, actions: list[tuple[str, str, int]]) -> None:
    served = family("llama")
    engine = Engine(served.base, CROWDED)
    engine.add_basis(served.basis)
    try:
        async with connect(url) as client:
            await client.flushall()
            world = World(client, engine)
            for action in actions:
                await world.act(*action)
            await world.finish()
            await client.flushall()
    finally:
        engine.close()
