"""Work whose commands to the store are let through one by one, so that a test chooses the interleaving."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

T = TypeVar("T")


class Gate:
    """Where the commands wait. A pipeline counts as one."""

    def __init__(self) -> None:
        self.is_open = False
        self.arrived = asyncio.Event()
        self._permits = asyncio.Semaphore(0)

    async def wait(self) -> None:
        if not self.is_open:
            self.arrived.set()
            await self._permits.acquire()

    def let_one_through(self) -> None:
        self.arrived.clear()
        self._permits.release()


class SteppedRedis(Redis):
    """A client, over the connections of another one, whose commands wait at a gate."""

    def __init__(self, redis: Redis, gate: Gate) -> None:
        super().__init__(connection_pool=redis.connection_pool)
        self._gate = gate

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        await self._gate.wait()
        return await super().execute_command(*args, **options)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        pipeline = _SteppedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline.gate = self._gate
        return pipeline


class _SteppedPipeline(Pipeline):
    gate: Gate

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        await self.gate.wait()
        return await super().execute(raise_on_error)


class Stepped(Generic[T]):
    """One piece of work that stops before each of its commands, all of them given to a `SteppedRedis`."""

    def __init__(self, gate: Gate, work: Coroutine[Any, Any, T]) -> None:
        self._gate, self._task = gate, asyncio.create_task(work)

    async def advance(self, num_commands: int) -> bool:
        """Let so many commands through. False: the work has ended."""
        for left in range(num_commands, -1, -1):
            arrival = asyncio.create_task(self._gate.arrived.wait())
            await asyncio.wait({arrival, self._task}, return_when=asyncio.FIRST_COMPLETED)
            arrival.cancel()
            if self._task.done():
                return False
            if left:
                self._gate.let_one_through()
        return True

    async def finish(self) -> T:
        """Let the rest through. Raises what the work raises."""
        while await self.advance(1):
            pass
        return await self._task

    async def cancel(self) -> None:
        """Cancel it where it waits."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
