"""A capacity that tenants share: it is never exceeded, nobody exceeds a share, and those who wait take
turns."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from service.processes.fair_gate import FairGate


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_tenant_leaves_room_for_the_others_and_they_take_turns() -> None:
    gate, order = FairGate(capacity=2, share=1), []

    async def work(tenant: str, index: int, gate_of_work: asyncio.Semaphore) -> None:
        async with gate.room(tenant):
            order.append(tenant)
            await gate_of_work.acquire()

    may_end = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(work("whale", i, may_end)) for i in range(5)]
    await settle()
    assert (order, gate.num_taken, gate.num_waiting) == (["whale"], 1, 4)
    tasks += [asyncio.create_task(work(name, 0, may_end)) for name in ("minnow", "perch")]
    await settle()
    assert order == ["whale", "minnow"], "there was capacity left for another tenant"
    for _ in tasks:
        may_end.release()
    await asyncio.gather(*tasks)
    assert order[2] in ("perch", "whale")
    assert "perch" in order[:4], "it waits for at most one turn of each other tenant"
    assert (gate.num_taken, gate.num_waiting) == (0, 0)


async def test_who_gives_up_waiting_leaves_no_trace() -> None:
    gate = FairGate(capacity=4, share=4)
    taken = await gate.take("a", 3)
    waiting = asyncio.create_task(gate.take("b", 2))
    behind = asyncio.create_task(gate.take("c", 1))
    await settle()
    assert gate.num_waiting == 2, "the small one does not overtake the large one"
    waiting.cancel()
    await settle()
    gate.give_back("a", taken)
    assert await behind == 1
    gate.give_back("c", 1)
    assert (gate.num_taken, gate.num_waiting) == (0, 0)


async def test_what_is_larger_than_the_share_gets_the_share() -> None:
    gate = FairGate(capacity=10, share=5)
    assert await gate.take("a", 100) == 5
    assert await gate.take("b", 100) == 5
    gate.give_back("a", 5)
    gate.give_back("b", 5)


@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8))))
def test_no_more_than_there_is_and_all_get_in(
    capacity: int, share: int, requests: list[tuple[str, int]]
) -> None:
    share = min(capacity, share)

    async def run() -> None:
        gate = FairGate(capacity=capacity, share=share)
        held: dict[str, int] = dict.fromkeys("abc", 0)

        async def one(tenant: str, size: int) -> None:
            taken = await gate.take(tenant, size)
            held[tenant] += taken
            assert sum(held.values()) <= gate.num_taken <= capacity
            assert held[tenant] <= share
            await asyncio.sleep(0)
            held[tenant] -= taken
            gate.give_back(tenant, taken)

        await asyncio.gather(*(one(*request) for request in requests))
        assert (gate.num_taken, gate.num_waiting) == (0, 0)

    asyncio.run(run())
