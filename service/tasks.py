"""Ending asyncio tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

#: Between two cancellations of one task.
RETRY_S = 0.5


async def end_tasks(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended; what they raise is dropped.

    Once is not enough: before Python 3.12 `asyncio.wait_for` loses a cancellation that comes together with
    the result it waits for, and redis-py waits with it.
    """
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=RETRY_S)
    await asyncio.gather(*tasks, return_exceptions=True)
