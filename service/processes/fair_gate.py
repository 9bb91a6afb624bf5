"""Share a scarce resource of an API process (threads for large inputs, memory for bodies) between tenants."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairGate:
    """A limited capacity, of which each tenant may take a share; waiting tenants are admitted in turn.

    capacity: for all tenants together. share: the most that one tenant may take, so that some is always left
    for the others. Lives in one event loop.
    """

    def __init__(self, *, capacity: int, share: int) -> None:
        assert 0 < share <= capacity
        self._capacity = capacity
        self._share = share
        #: How much all tenants together have taken.
        self.num_taken = 0
        self._taken: Counter[str] = Counter()  # by tenant
        self._lines: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @asynccontextmanager
    async def room(self, tenant: str, size: int = 1) -> AsyncIterator[None]:
        """Wait until `size` can be taken, and give it back at the end."""
        taken = await self.take(tenant, size)
        try:
            yield
        finally:
            self.give_back(tenant, taken)

    async def take(self, tenant: str, size: int = 1) -> int:
        """Wait until `size` can be taken, and return how much was taken: a size above a tenant's share counts
        as the whole share."""
        size = min(size, self._share)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tenant, deque()).append((size, granted))
        self._admit()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.give_back(tenant, size)
            else:
                self._leave_line(tenant, size, granted)
                self._admit()  # those that waited behind it
            raise
        return size

    def give_back(self, tenant: str, size: int) -> None:
        """Return what `take` returned, and admit those that waited for it."""
        self.num_taken -= size
        self._taken[tenant] -= size
        if not self._taken[tenant]:
            del self._taken[tenant]
        self._admit()

    def _admit(self) -> None:
        """Admit the first of each tenant's line, tenant after tenant, until the capacity is taken."""
        is_progress = True
        while is_progress:
            is_progress = False
            for tenant in list(self._lines):
                size, granted = self._lines[tenant][0]
                if granted.cancelled():  # its task has not run yet
                    self._leave_line(tenant, size, granted)
                    is_progress = True
                    continue
                if self._taken[tenant] + size > self._share:
                    continue  # a tenant that has taken its share waits until it gives something back
                if self.num_taken + size > self._capacity:
                    return  # smaller requests must not overtake, or a large one would wait forever
                self._leave_line(tenant, size, granted)
                if tenant in self._lines:
                    self._lines.move_to_end(tenant)
                self.num_taken += size
                self._taken[tenant] += size
                granted.set_result(None)
                is_progress = True

    def _leave_line(self, tenant: str, size: int, granted: asyncio.Future[None]) -> None:
        line = self._lines.get(tenant, deque())
        if (size, granted) in line:
            line.remove((size, granted))
            if not line:
                del self._lines[tenant]
