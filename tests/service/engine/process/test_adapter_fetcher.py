"""Fetching ahead: each adapter once, those of one moment together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
import torch

from service.engine.adapters.packed_adapter import PackedAdapter
from service.engine.process.adapter_fetcher import MAX_READ, AdapterFetcher
from service.engine.process.engine_thread import CommandReply
from tessera.errors import BasisMismatch, NotFound, TesseraError
from tessera.formats.adapter_ref import AdapterRef
from tests.waiting import wait_until

GONE = "gone"


def ref(name: str) -> AdapterRef:
    return AdapterRef("t", name, 1, "basis")


class Reader:
    """Answers while its gate is open, and records which adapters were read together."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.reads: list[list[str]] = []

    async def read_adapters(self, refs: Sequence[AdapterRef]) -> list[PackedAdapter | TesseraError]:
        self.reads.append([ref.adapter_id for ref in refs])
        await self.gate.wait()
        return [
            NotFound("gone") if ref.adapter_id == GONE else PackedAdapter("basis", torch.ones(1, 1, 1))
            for ref in refs
        ]


class Thread:
    """Stands in for the engine's thread and its engine: takes what is provided, and replies when the test
    does."""

    def __init__(self) -> None:
        self.engine = self
        self.held: set[AdapterRef] = set()
        self.provided: list[tuple[AdapterRef, PackedAdapter | TesseraError]] = []
        self.replies: list[CommandReply] = []
        self.failure: BaseException | None = None

    def holds(self, ref: AdapterRef) -> bool:
        return ref in self.held

    def post(self, command: Callable[[Thread], None], reply: CommandReply) -> None:
        command(self)
        self.replies.append(reply)

    def provide_adapter(self, ref: AdapterRef, adapter: PackedAdapter | TesseraError) -> None:
        self.provided.append((ref, adapter))

    def on_failure(self, error: BaseException) -> None:
        self.failure = error

    def reply(self, error: TesseraError | None = None) -> None:
        """Answer everything that was provided so far."""
        replies, self.replies = self.replies, []
        for reply in replies:
            reply(error)


class Setting:
    def __init__(self) -> None:
        self.reader = Reader()
        self.thread = Thread()
        self.fetcher = AdapterFetcher(self.reader, self.thread)  # type: ignore[arg-type]


@pytest.fixture
async def setting() -> Setting:
    return Setting()


async def test_adapters_of_one_moment_travel_together(setting: Setting) -> None:
    setting.fetcher.fetch([ref("a")])
    setting.fetcher.fetch([ref("b"), ref("a")])
    setting.fetcher.fetch([])
    await wait_until(lambda: len(setting.thread.provided) == 2)

    assert setting.reader.reads == [["a", "b"]]


async def test_a_crowd_is_read_in_pieces_so_that_the_first_need_not_wait_for_the_last(
    setting: Setting,
) -> None:
    setting.fetcher.fetch([ref(f"a{index}") for index in range(2 * MAX_READ + 3)])
    await wait_until(lambda: len(setting.thread.provided) == 2 * MAX_READ + 3)

    assert [len(names) for names in setting.reader.reads] == [MAX_READ, MAX_READ, 3]


async def test_an_adapter_is_fetched_again_only_after_the_engine_has_it(setting: Setting) -> None:
    reader, thread, fetcher = setting.reader, setting.thread, setting.fetcher
    reader.gate.clear()
    fetcher.fetch([ref("a")])
    await wait_until(lambda: reader.reads == [["a"]])
    fetcher.fetch([ref("a"), ref("b")])
    await wait_until(lambda: reader.reads == [["a"], ["b"]])
    reader.gate.set()
    await wait_until(lambda: len(thread.provided) == 2)
    fetcher.fetch([ref("a")])
    await asyncio.sleep(0)
    assert len(reader.reads) == 2

    thread.reply()
    fetcher.fetch([ref("a")])
    await wait_until(lambda: len(thread.provided) == 3)
    assert reader.reads == [["a"], ["b"], ["a"]]


async def test_only_what_the_engine_lacks_is_fetched_ahead(setting: Setting) -> None:
    setting.thread.held.add(ref("a"))
    setting.fetcher.fetch_ahead(ref("a"))
    setting.fetcher.fetch_ahead(ref("b"))
    await wait_until(lambda: len(setting.thread.provided) == 1)

    assert setting.reader.reads == [["b"]]


async def test_an_error_is_provided_in_the_place_of_its_adapter(setting: Setting) -> None:
    setting.fetcher.fetch([ref("a"), ref(GONE)])
    await wait_until(lambda: len(setting.thread.provided) == 2)

    found = {ref.adapter_id: type(found) for ref, found in setting.thread.provided}
    assert found == {"a": PackedAdapter, GONE: NotFound}


async def test_an_adapter_that_the_engine_cannot_use_becomes_the_error_of_its_requests(
    setting: Setting,
) -> None:
    setting.fetcher.fetch([ref("a")])
    await wait_until(lambda: len(setting.thread.provided) == 1)

    setting.thread.reply(BasisMismatch("another rank"))

    assert [type(found) for _, found in setting.thread.provided] == [PackedAdapter, BasisMismatch]


async def test_a_read_that_fails_in_an_unforeseen_way_is_reported(setting: Setting) -> None:
    async def read_adapters(refs: Sequence[AdapterRef]) -> list[PackedAdapter | TesseraError]:
        raise ZeroDivisionError

    setting.reader.read_adapters = read_adapters  # type: ignore[method-assign]
    setting.fetcher.fetch([ref("a")])
    await wait_until(lambda: setting.thread.failure is not None)

    assert isinstance(setting.thread.failure, ZeroDivisionError)
