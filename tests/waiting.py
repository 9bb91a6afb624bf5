"""Waiting for something to become true, instead of sleeping for as long as it usually takes."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

import psutil

INTERVAL_S = 0.02
#: After this much waiting a test hangs. No test is decided by it: it is for a fault, and the machine may be
#: many times slower than a developer's. Less than pytest's own time-out, which says less.
HANG_S = 600.0


async def wait_until(predicate: Callable[[], Any], timeout_s: float = HANG_S) -> Any:
    """The first true value of `predicate` (plain or async). Fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s} s: {_source(predicate)}")
        await asyncio.sleep(INTERVAL_S)


def wait_until_sync(predicate: Callable[[], Any], timeout_s: float = HANG_S) -> Any:
    """`wait_until` for tests without an event loop."""
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s} s: {_source(predicate)}")
        time.sleep(INTERVAL_S)
    return value


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits to be reaped by a parent that may never do so."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _source(predicate: Callable[[], Any]) -> str:
    try:
        return inspect.getsource(predicate).strip()
    except (OSError, TypeError):  # a partial, a built-in
        return repr(predicate)
