"""The engine process: the real core, model and store behind a socket, and what happens when one of them
fails."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from service.engine.client.connection import merge_outputs
from service.engine.client.engine_client import EngineClient
from service.engine.engine import Engine
from service.engine.settings import EngineConfig, EngineSettings
from service.engine.wire import ipc
from service.engine.wire.messages import GenerationRequest, TokenOutput
from tessera.errors import EngineUnavailable, InvalidInput
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tessera.redis import keys
from tessera.redis.client import connect
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tests.service.engine.engine_process import (
    PROMPT,
    RANK,
    complete,
    make_adapter,
    make_request,
    publish,
    running,
    store_basis,
)
from tests.service.engine.process.hanging_engine import HANGING_TOKEN
from tests.waiting import HANG_S, wait_until

# One engine process serves the whole module, because its start takes seconds.
pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Long enough that a busy test machine is not taken for a hung engine.
HEARTBEAT_S = 6.0
#: Tokens of a request that is not meant to reach its end.
LONG = 2000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    await wait_until(client.ping)
    await client.flushall()
    yield client
    await client.flushall()
    await client.aclose()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> CommonSettings:
    return CommonSettings(
        data_dir=tmp_path_factory.mktemp("data"), rank=RANK, device="cpu", log_level="WARNING"
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    redis: Redis, redis_url: str, settings: CommonSettings, tiny: BaseModel, tiny_basis: Basis
) -> AsyncIterator[EngineClient]:
    """The client of a running engine with `tiny_basis` as its default basis."""
    await store_basis(BasisStore(redis), settings, tiny, tiny_basis)
    options = EngineSettings(heartbeat_timeout_s=HEARTBEAT_S, threads=1)
    command = [sys.executable, str(Path(__file__).with_name("hanging_engine.py"))]
    async with running(EngineClient(settings, redis_url, engine_settings=options, command=command)) as client:
        await client.wait_ready(HANG_S)
        yield client


@pytest.fixture
def adapters(redis: Redis) -> AdapterStore:
    return AdapterStore(redis)


def complete_in_core(engine: Engine, requests: list[GenerationRequest]) -> dict[str, TokenOutput]:
    """The oracle: the same requests run by the core directly, without a process in between."""
    for request in requests:
        engine.submit(request)
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return {request_id: merge_outputs(parts) for request_id, parts in outputs.items()}


async def tokens_generated(engine: EngineClient) -> int:
    stats = await wait_until(lambda: engine.stats)
    return int(stats.generation_tokens_total)


async def is_at_rest(engine: EngineClient) -> bool:
    stats = engine.stats
    return stats is not None and stats.num_running + stats.num_waiting + stats.kv_blocks_used == 0


@asynccontextmanager
async def raw_connection(engine: EngineClient, settings: CommonSettings) -> AsyncIterator[Any]:
    """The connection of a second API process: its reader and writer."""
    [path] = (settings.data_dir / "run").glob(f"engine-{os.getpid()}-*.sock")
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_until(reader: asyncio.StreamReader, kind: str) -> dict[str, Any]:
    async with asyncio.timeout(HANG_S):
        while (message := await ipc.read_frame(reader)) is not None:
            if message["type"] == kind:
                return message
    raise AssertionError(f"the stream ended before a {kind} message")


async def test_the_engine_introduces_itself(engine: EngineClient, tiny: BaseModel, tiny_basis: Basis) -> None:
    info = engine.info

    assert (info.model_id, info.model_name) == (tiny.model_id, tiny.name)
    assert info.default_basis_id == tiny_basis.basis_id
    assert psutil.Process(info.pid).ppid() == os.getpid()
    assert engine.starting_error is None


async def test_results_over_the_socket_are_those_of_the_core(
    engine: EngineClient, adapters: AdapterStore, tiny: BaseModel, tiny_basis: Basis
) -> None:
    made = {f"same-{i}": make_adapter(tiny_basis, i) for i in range(3)}
    refs = {name: await publish(adapters, name, adapter) for name, adapter in made.items()}
    requests = [make_request(name, ref, prompt_logprobs=0) for name, ref in refs.items()]
    requests += [make_request("base"), make_request("sampled", temperature=1.0, seed=5)]
    core = Engine(tiny, EngineConfig())
    core.add_basis(tiny_basis)
    for name, ref in refs.items():
        core.provide_adapter(ref, made[name])

    expected = complete_in_core(core, requests)
    core.close()  # gives the shared model back
    results = await asyncio.gather(*(complete(engine, request) for request in requests))

    for result in results:
        oracle = expected[result.request_id]
        assert result.token_ids == oracle.token_ids
        assert result.finish_reason == oracle.finish_reason
        logprobs = [entry.logprob for entry in result.logprobs]
        assert logprobs == pytest.approx([entry.logprob for entry in oracle.logprobs], abs=1e-4)
    assert len({tuple(result.token_ids) for result in results}) == len(results)
    assert results[0].prompt_logprobs is not None
    assert len(results[0].prompt_logprobs) == len(PROMPT) - 1


async def test_twenty_users_at_once_get_what_each_gets_alone(
    engine: EngineClient, adapters: AdapterStore, tiny_basis: Basis
) -> None:
    refs = [await publish(adapters, f"crowd-{i}", make_adapter(tiny_basis, 100 + i)) for i in range(20)]

    together = await asyncio.gather(
        *(complete(engine, make_request(f"t{i}", ref)) for i, ref in enumerate(refs))
    )
    alone = [await complete(engine, make_request(f"a{i}", ref)) for i, ref in enumerate(refs)]

    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert len({tuple(result.token_ids) for result in together}) == 20
    assert max(result.num_distinct for result in together) > 1


async def test_a_cancelled_request_frees_its_blocks(engine: EngineClient) -> None:
    before = await tokens_generated(engine)
    stream = engine.generate(make_request("long", max_tokens=LONG, min_tokens=LONG))
    await anext(stream)
    await wait_until(lambda: engine.stats is not None and engine.stats.kv_blocks_used > 0)

    await stream.aclose()

    await wait_until(lambda: is_at_rest(engine))
    assert await tokens_generated(engine) - before < LONG


async def test_a_lost_connection_cancels_its_requests(engine: EngineClient, settings: CommonSettings) -> None:
    before = await tokens_generated(engine)
    async with raw_connection(engine, settings) as (reader, writer):
        request = make_request("long", max_tokens=LONG, min_tokens=LONG)
        writer.write(ipc.encode("submit", request=ipc.request_map(request)))
        await read_until(reader, "outputs")
        await wait_until(lambda: engine.stats is not None and engine.stats.num_running == 1)

    await wait_until(lambda: is_at_rest(engine))
    assert await tokens_generated(engine) - before < LONG


async def test_two_connections_may_use_the_same_request_id(
    engine: EngineClient, settings: CommonSettings
) -> None:
    expected = await complete(engine, make_request("alone"))
    async with raw_connection(engine, settings) as (reader, writer):
        own = asyncio.create_task(complete(engine, make_request("same")))
        writer.write(ipc.encode("submit", request=ipc.request_map(make_request("same", max_tokens=1))))
        [row] = (await read_until(reader, "outputs"))["outputs"]
        theirs = ipc.output_from_row(row)

        assert theirs.request_id == "same"
        assert theirs.token_ids == expected.token_ids[:1]
        assert (await own).token_ids == expected.token_ids


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x01\xc1",
        ipc.encode("dance"),
        ipc.encode("submit", request={"request_id": "x"}),
        ipc.encode("submit", request=7),
        ipc.encode("cancel"),
    ],
    ids=["other protocol", "giant frame", "no msgpack", "unknown type", "half a request", "number", "no id"],
)
async def test_garbage_costs_its_own_connection_only(
    engine: EngineClient, settings: CommonSettings, garbage: bytes
) -> None:
    stream = engine.generate(make_request("bystander", max_tokens=20, min_tokens=20))
    first = await anext(stream)
    async with raw_connection(engine, settings) as (reader, writer):
        writer.write(garbage)
        async with asyncio.timeout(HANG_S):
            await reader.read(-1)  # until the engine closes the connection

    rest = [output async for output in stream]
    assert len(merge_outputs([first, *rest]).token_ids) == 20


async def test_a_request_of_wrong_types_is_refused_and_no_one_else_suffers(
    engine: EngineClient, settings: CommonSettings
) -> None:
    values = {**ipc.request_map(make_request("odd")), "token_ids": "words"}
    async with raw_connection(engine, settings) as (reader, writer):
        writer.write(ipc.encode("submit", request=values))
        refusal = await read_until(reader, "refused")

    assert refusal["request_id"] == "odd"
    assert (await complete(engine, make_request("after"))).finish_reason == "length"


async def test_a_refusal_of_the_core_is_raised_with_its_parameter(engine: EngineClient) -> None:
    with pytest.raises(InvalidInput) as caught:
        await complete(engine, replace(make_request("outside"), token_ids=[10**6]))

    assert caught.value.param
    assert (await complete(engine, make_request("after"))).finish_reason == "length"


async def test_a_missing_adapter_fails_its_request_until_it_is_there(
    engine: EngineClient, adapters: AdapterStore, tiny_basis: Basis
) -> None:
    ref = AdapterRef("default", "late", 1, tiny_basis.basis_id)

    before = await complete(engine, make_request("before", ref))
    await publish(adapters, "late", make_adapter(tiny_basis, 7))
    after = await complete(engine, make_request("after", ref))

    assert before.finish_reason == "error"
    assert before.error is not None
    assert before.error[0] == "model_not_found"
    assert after.finish_reason == "length"


async def test_an_adapter_of_an_unknown_basis_fails_its_request(engine: EngineClient) -> None:
    result = await complete(engine, make_request("r", AdapterRef("default", "stray", 1, "ab" * 32)))

    assert result.finish_reason == "error"


async def test_a_second_basis_comes_from_the_store(
    engine: EngineClient, redis: Redis, adapters: AdapterStore, tiny: BaseModel
) -> None:
    from tessera.methods.bases import build_basis

    other = build_basis(tiny, rank=RANK, target_modules=["q_proj", "v_proj"])
    await BasisStore(redis).put(other)
    ref = await publish(adapters, "other-basis", make_adapter(other, 11))

    result = await complete(engine, make_request("r", ref))

    assert result.finish_reason == "length"
    assert result.token_ids != (await complete(engine, make_request("base"))).token_ids


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other version", "other type"])
async def test_a_damaged_record_fails_only_its_own_request(
    engine: EngineClient, redis: Redis, adapters: AdapterStore, tiny_basis: Basis, damage: str
) -> None:
    name = f"damaged-{damage.replace(' ', '-')}"
    sound = await publish(adapters, f"beside-{name}", make_adapter(tiny_basis, 21))
    expected = await complete(engine, make_request("alone", sound))
    ref = await publish(adapters, name, make_adapter(tiny_basis, 22))
    key = keys.adapter_blob(ref.tenant, ref.adapter_id, ref.version)
    blob = await redis.get(key)
    damaged = {
        "truncated": blob[:-7],
        "flipped": blob[:-1] + bytes([blob[-1] ^ 1]),
        "empty": b"",
        "other version": make_adapter(tiny_basis, 22).to_bytes(version=9),
    }
    await redis.delete(key)
    if damage == "other type":
        await redis.hset(key, "a", "b")
    else:
        await redis.set(key, damaged[damage])
    await engine.unload("default", sound.adapter_id)  # so that both are fetched together

    broken, beside = await asyncio.gather(
        complete(engine, make_request("broken", ref)), complete(engine, make_request("beside", sound))
    )

    assert broken.finish_reason == "error"
    assert broken.error is not None
    assert broken.error[0] in ("corrupt_record", "model_not_found")
    assert beside.token_ids == expected.token_ids


async def test_after_unload_a_deleted_adapter_is_gone_and_a_new_one_is_fresh(
    engine: EngineClient, adapters: AdapterStore, tiny_basis: Basis
) -> None:
    old = await publish(adapters, "reborn", make_adapter(tiny_basis, 31))
    old_tokens = (await complete(engine, make_request("old", old))).token_ids
    await adapters.delete("default", "reborn")
    still_there = await complete(engine, make_request("cached", old))

    await engine.unload("default", "reborn")

    gone = await complete(engine, make_request("gone", old))
    new = await publish(adapters, "reborn", make_adapter(tiny_basis, 32))
    new_tokens = (await complete(engine, make_request("new", new))).token_ids
    assert still_there.token_ids == old_tokens
    assert gone.finish_reason == "error"
    assert new.version > old.version
    assert new_tokens != old_tokens


async def test_kill_9_costs_the_requests_in_flight_and_nothing_else(
    engine: EngineClient, adapters: AdapterStore, tiny_basis: Basis
) -> None:
    ref = await publish(adapters, "survivor", make_adapter(tiny_basis, 41))
    expected = await complete(engine, make_request("before", ref))
    restarts = engine.restarts_total
    streams = [
        engine.generate(make_request(f"r{i}", ref, max_tokens=LONG, min_tokens=LONG)) for i in range(5)
    ]
    for stream in streams:
        await anext(stream)

    os.kill(engine.info.pid, signal.SIGKILL)

    for stream in streams:
        with pytest.raises(EngineUnavailable):
            async for _ in stream:
                pass
    assert not engine.is_ready
    await engine.wait_ready(HANG_S)
    assert engine.restarts_total == restarts + 1
    assert (await complete(engine, make_request("after", ref))).token_ids == expected.token_ids


async def test_a_stopped_process_is_replaced(engine: EngineClient) -> None:
    pid, restarts = engine.info.pid, engine.restarts_total
    stream = engine.generate(make_request("r", max_tokens=LONG, min_tokens=LONG))
    await anext(stream)

    os.kill(pid, signal.SIGSTOP)

    with pytest.raises(EngineUnavailable):
        async for _ in stream:
            pass
    await wait_until(lambda: not psutil.pid_exists(pid))
    await engine.wait_ready(HANG_S)
    assert engine.restarts_total == restarts + 1


async def test_a_hung_step_costs_its_process_and_its_requests_get_a_clean_error(
    engine: EngineClient,
) -> None:
    pid, restarts = engine.info.pid, engine.restarts_total
    expected = await complete(engine, make_request("before"))
    beside = engine.generate(make_request("beside", max_tokens=LONG, min_tokens=LONG))
    await anext(beside)

    with pytest.raises(EngineUnavailable, match="ended while it worked"):
        await complete(engine, replace(make_request("hangs"), token_ids=[*PROMPT, HANGING_TOKEN]))
    with pytest.raises(EngineUnavailable, match="ended while it worked"):
        async for _ in beside:
            pass

    await wait_until(lambda: not psutil.pid_exists(pid))
    info = await engine.wait_ready(HANG_S)
    assert (info.restarts, engine.restarts_total) == (restarts + 1, restarts + 1)
    assert (await complete(engine, make_request("after"))).token_ids == expected.token_ids


async def test_the_books_balance_after_all_of_this(engine: EngineClient) -> None:
    await wait_until(lambda: is_at_rest(engine))
    await engine.check_integrity()
