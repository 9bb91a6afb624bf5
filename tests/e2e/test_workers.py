"""Two API processes over one engine: the official client, one scrape for both, the death of either part."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch

from benchmarks.load.adapters import TENANT, make_adapter, store_adapters
from benchmarks.load.client import Outcome, Prompt, complete
from benchmarks.load.stack import ServiceStack
from tessera.redis.client import connect
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tests.waiting import HANG_S, wait_until_sync

pytestmark = pytest.mark.xdist_group("workers")

NUM_ADAPTERS = 40
LONG = 1000


class Workers(ServiceStack):
    """`python -m service` with two API processes and an embedded store that has adapters."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir, {"TESSERA_SERVICE_WORKERS": "2", "TESSERA_ENGINE_NUM_SLOTS": "8"})
        self.wait_ready()
        asyncio.run(self._fill())

    async def _fill(self) -> None:
        async with connect(self.store_url) as redis:
            [manifest] = await BasisStore(redis).list()
            await store_adapters(redis, manifest, prefix="user", count=NUM_ADAPTERS)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def children(self, module: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children():
            try:
                if module in process.cmdline():
                    found.append(process)
            except psutil.Error:  # it ends just now
                continue
        return found

    def scrape(self, name: str) -> float:
        """The sum of the samples that begin so."""
        return sum(value for sample, value in self.metrics().items() if sample.startswith(name))


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    running = Workers(tmp_path_factory.mktemp("workers"))
    yield running
    processes = psutil.Process(running.process.pid).children(recursive=True)
    running.stop()
    _, alive = psutil.wait_procs(processes, timeout=HANG_S)
    assert not alive, f"left behind: {[process.cmdline() for process in alive]}"
    assert running.process.returncode == 0


def test_the_official_client_is_answered_by_both(workers: Workers) -> None:
    wait_until_sync(lambda: len(workers.children("service.api_worker")) == 2)
    served = 'tessera_http_requests_total{method="POST",route="/v1/completions",status="200"}'
    before = workers.scrape(served)

    def ask(index: int) -> str:
        client = workers.client  # a connection of its own, so that either process may take it
        model = "tiny" if index % 4 == 0 else f"user-{index}"
        reply = client.completions.create(model=model, prompt="The program", max_tokens=4, temperature=0)
        return reply.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(24)))

    assert len({text for index, text in enumerate(texts) if index % 4 == 0}) == 1
    assert len(set(texts)) > 1
    assert workers.scrape(served) == before + 24
    assert workers.scrape("tessera_engine_up") == 1
    assert workers.scrape("tessera_http_requests_in_flight") >= 1


def test_an_adapter_deleted_while_it_generates_ends_that_answer_and_begins_no_new_one(
    workers: Workers,
) -> None:
    client = workers.client
    stream = client.completions.create(
        model="user-30", prompt="The", max_tokens=80, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)

    assert client.models.delete("user-30").deleted
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="user-30", prompt="The", max_tokens=1)
    chunks = list(stream)

    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_version_published_in_the_middle_serves_the_next_request_only(workers: Workers) -> None:
    client = workers.client
    options = {"prompt": "The", "temperature": 0, "extra_body": {"ignore_eos": True}}
    expected = client.completions.create(model="user-31", max_tokens=60, **options).choices[0].text
    stream = client.completions.create(model="user-31", max_tokens=60, stream=True, **options)
    first = next(stream)

    async def publish() -> None:
        async with connect(workers.store_url) as redis:
            [manifest] = await BasisStore(redis).list()
            await AdapterStore(redis).publish(
                TENANT, "user-31", make_adapter(manifest, 99), dtype=torch.float16
            )

    asyncio.run(publish())
    after = client.completions.create(model="user-31", max_tokens=1, **options)
    rest = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    assert first.choices[0].text + rest == expected
    assert after.model_dump()["adapter"]["version"] == 2


def test_the_load_client_reads_answers_errors_and_hangs_up(workers: Workers) -> None:
    async def ask() -> list[Outcome]:
        prompts = [
            Prompt("user-1", [5, 6, 7], 6),
            Prompt("nobody", [5], 1),
            Prompt("tiny", [10**8], 1),
            Prompt("tiny", [5, 6], LONG, cancel_after=2),
        ]
        return await asyncio.gather(*(complete(workers.port, p, timeout_s=HANG_S) for p in prompts))

    good, missing, wrong, cancelled = asyncio.run(ask())

    assert (good.error, good.num_tokens, missing.error, wrong.error) == (
        None,
        6,
        "model_not_found",
        "invalid_value",
    )
    assert good.first_token_s is not None
    assert cancelled.is_cancelled
    wait_until_sync(lambda: workers.scrape('tessera_sequences{state="running"}') == 0)


def test_a_killed_api_process_is_replaced_and_the_other_answers_meanwhile(workers: Workers) -> None:
    wait_until_sync(lambda: len(workers.children("service.api_worker")) == 2)
    engine = workers.children("service.engine")[0].pid
    victim = workers.children("service.api_worker")[0]
    before = workers.scrape("tessera_http_requests_total")

    victim.kill()
    victim.wait(HANG_S)

    for _ in range(4):
        assert workers.client.completions.create(model="tiny", prompt="A", max_tokens=1).choices
    wait_until_sync(lambda: len(workers.children("service.api_worker")) == 2)
    assert workers.children("service.engine")[0].pid == engine
    assert workers.scrape("tessera_http_requests_total") >= before + 4


def test_a_killed_engine_is_found_again_by_both(workers: Workers) -> None:
    stream = workers.client.completions.create(
        model="tiny", prompt="The program", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    [engine] = workers.children("service.engine")

    engine.kill()

    with pytest.raises(openai.APIError):
        list(stream)
    workers.wait_ready()

    def all_are_ready() -> bool:
        return all(
            httpx.get(f"{workers.url}/health/ready", timeout=HANG_S).status_code == 200 for _ in range(6)
        )

    wait_until_sync(all_are_ready)
    assert workers.scrape("tessera_engine_restarts_total") >= 1
