"""Waiting for something to become true, instead of sleeping for as long as it usually takes."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

INTERVAL_S = 0.02


async def wait_until(predicate: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """The first true value of `predicate` (plain or async). Fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s} s: {inspect.getsource(predicate).strip()}")
        await asyncio.sleep(INTERVAL_S)
