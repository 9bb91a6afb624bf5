"""The proxy that repeats the calls of a store until it answers."""

from __future__ import annotations

import pytest

from tessera.errors import NotFound, StoreUnavailable, Unavailable
from trainer_worker.common.waits import retrying


class FlakyStore:
    """A store that does not answer its first calls."""

    def __init__(self, *, num_outages: int) -> None:
        self.num_calls, self.num_outages = 0, num_outages

    async def add(self, one: int, *, other: int) -> int:
        self.num_calls += 1
        if self.num_calls <= self.num_outages:
            raise StoreUnavailable("no answer")
        return one + other

    async def fail(self) -> None:
        self.num_calls += 1
        raise NotFound("nothing here")

    def size(self) -> int:
        return 3


async def test_a_call_is_repeated_until_the_store_answers() -> None:
    outages: list[Unavailable] = []
    store = FlakyStore(num_outages=2)
    assert await retrying(store, outages.append).add(1, other=2) == 3
    assert store.num_calls == 3
    assert [type(error) for error in outages] == [StoreUnavailable, StoreUnavailable]


async def test_other_errors_and_other_attributes_pass() -> None:
    outages: list[Unavailable] = []
    store = FlakyStore(num_outages=0)
    proxy = retrying(store, outages.append)
    with pytest.raises(NotFound):
        await proxy.fail()
    assert store.num_calls == 1
    assert (proxy.size(), proxy.num_calls) == (3, 1)
    assert outages == []
