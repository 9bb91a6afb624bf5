"""Fetching ahead: each adapter once, those of one moment together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
import torch

from service.engine.adapters.packed_adapter import PackedAdapter
from service.engine.process.adapter_fetches import MAX_READ, AdapterFetches, Found
from tessera.errors import NotFound
from tessera.formats.adapter_ref import AdapterRef
from tests.waiting import wait_until

GONE = "gone"


def ref(name: str) -> AdapterRef:
    return AdapterRef("t", name, 1, "basis")


class Store:
    """Answers while its gate is open; remembers what was asked for together."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.reads: list[list[str]] = []

    async def read(self, refs: Sequence[AdapterRef]) -> list[Found]:
        self.reads.append([ref.adapter_id for ref in refs])
        await self.gate.wait()
        return [
            NotFound("gone") if ref.adapter_id == GONE else PackedAdapter("basis", torch.ones(1, 1, 1))
            for ref in refs
        ]


class Desk:
    """Takes what comes; says that it arrived only when asked to."""

    def __init__(self, store: Store) -> None:
        self.provided: list[tuple[AdapterRef, Found]] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.fetches = AdapterFetches(
            store.read, lambda ref, found: self.provided.append((ref, found)), self.spawn
        )

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.add(asyncio.create_task(work))


@pytest.fixture
async def store() -> Store:
    return Store()


@pytest.fixture
async def desk(store: Store) -> Desk:
    return Desk(store)


async def test_what_is_wanted_at_one_moment_travels_together(store: Store, desk: Desk) -> None:
    desk.fetches.fetch([ref("a")])
    desk.fetches.fetch([ref("b"), ref("a")])
    desk.fetches.fetch([])
    await wait_until(lambda: len(desk.provided) == 2)

    assert store.reads == [["a", "b"]]


async def test_a_crowd_is_read_in_pieces_so_that_the_first_need_not_wait_for_the_last(
    store: Store, desk: Desk
) -> None:
    desk.fetches.fetch([ref(f"a{index}") for index in range(2 * MAX_READ + 3)])
    await wait_until(lambda: len(desk.provided) == 2 * MAX_READ + 3)

    assert [len(names) for names in store.reads] == [MAX_READ, MAX_READ, 3]


async def test_what_is_on_its_way_is_fetched_again_only_after_the_engine_has_it(
    store: Store, desk: Desk
) -> None:
    store.gate.clear()
    desk.fetches.fetch([ref("a")])
    await wait_until(lambda: store.reads == [["a"]])
    desk.fetches.fetch([ref("a"), ref("b")])
    await wait_until(lambda: store.reads == [["a"], ["b"]])
    store.gate.set()
    await wait_until(lambda: len(desk.provided) == 2)
    desk.fetches.fetch([ref("a")])
    await asyncio.gather(*desk.tasks)
    assert len(store.reads) == 2

    desk.fetches.arrived(ref("a"))
    desk.fetches.fetch([ref("a")])
    await wait_until(lambda: len(desk.provided) == 3)
    assert store.reads == [["a"], ["b"], ["a"]]


async def test_an_error_is_provided_in_the_place_of_its_adapter(desk: Desk) -> None:
    desk.fetches.fetch([ref("a"), ref(GONE)])
    await wait_until(lambda: len(desk.provided) == 2)

    found = {ref.adapter_id: type(found) for ref, found in desk.provided}
    assert found == {"a": PackedAdapter, GONE: NotFound}
