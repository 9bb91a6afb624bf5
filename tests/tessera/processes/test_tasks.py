"""Ending tasks that do not hear the first time."""

from __future__ import annotations

import asyncio

from tessera.processes.tasks import end_tasks


async def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    heard = 0

    async def deaf() -> None:
        nonlocal heard
        while heard < 2:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard += 1

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)

    await end_tasks(task)

    assert heard == 2
    assert task.done()


async def test_what_a_task_raises_at_its_end_is_dropped() -> None:
    async def failing() -> None:
        raise ValueError("nobody waits for this")

    task = asyncio.create_task(failing())
    await asyncio.sleep(0)

    await end_tasks(task)
