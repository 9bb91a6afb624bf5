"""Who waits to be admitted, fair between tenants.

Each tenant has a line of its own, and whose line is next is a matter of the tokens that each has been given
(`tenant_shares.py`), so that one with ten thousand requests delays another's only request by one of its own.
Requests whose adapter or basis is not there yet are parked beside the lines: they hold nobody up, and join
their tenant's line when it has come.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping

from service.engine.scheduling.request import EngineRequest
from service.engine.scheduling.tenant_shares import TenantShares
from tessera.formats.adapter_ref import AdapterRef

#: Of one tenant's line so many are looked at in one pass, where those at its front wait for a slot: bounds
#: the time of a pass (1 µs each), and what is looked at next is a step away.
MAX_LOOKAHEAD = 1024

#: When the tenant's next request may run, then who came first.
_Turn = tuple[float, int, str]


class WaitingLine:
    """Requests that are not running: in line by tenant, or parked by adapter. weights: shares by tenant."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._shares = TenantShares(weights)
        self._lines: dict[str, OrderedDict[str, EngineRequest]] = {}
        self._turns: list[_Turn] = []  # one per line, ascending
        self._turn_of: dict[str, _Turn] = {}
        self._numbers = itertools.count()
        self._parked: dict[AdapterRef, dict[str, EngineRequest]] = {}
        self._num_waiting: Counter[str] = Counter()  # by tenant
        self.num_parked = 0
        self.num_in_line = 0

    def __len__(self) -> int:
        return self.num_in_line + self.num_parked

    def __iter__(self) -> Iterator[EngineRequest]:
        for group in (*self._lines.values(), *self._parked.values()):
            yield from group.values()

    def num_waiting(self, tenant: str) -> int:
        """How many of one tenant's requests wait, parked ones included."""
        return self._num_waiting[tenant]

    def enter(self, request: EngineRequest, *, parked_for: AdapterRef | None = None) -> None:
        """A new request: to the end of its tenant's line, or beside the lines until `wake(parked_for)`."""
        self._shares.enter(request.tenant)
        if parked_for is None:
            self._append(request)
        else:
            self.park(request, parked_for)

    def push_front(self, request: EngineRequest) -> None:
        """To the front of its tenant's line: it was running already, and has been charged."""
        self._append(request)
        self._lines[request.tenant].move_to_end(request.request_id, last=False)

    def in_turn(self) -> Iterator[EngineRequest]:
        """Who is in line, in the order of their tenants' turns. What is taken or parked meanwhile counts at
        once; what is passed over costs its tenant nothing, and the next of its line follows."""
        cursors: dict[str, Iterator[EngineRequest]] = {}
        index = 0
        while index < len(self._turns):
            tenant = self._turns[index][2]
            if tenant not in cursors:  # a copy, because the line changes while one goes along it
                cursors[tenant] = iter(list(itertools.islice(self._lines[tenant].values(), MAX_LOOKAHEAD)))
            request = next(cursors[tenant], None)
            if request is None:
                index += 1
            else:
                yield request

    def take(self, request: EngineRequest) -> None:
        """Out of the line to run; its tenant is charged for what is left to compute."""
        if not request.is_charged:
            request.is_charged = True
            num_output = request.sampling.max_tokens - request.num_output
            self._shares.charge(request.tenant, request.num_uncomputed + num_output)
        self._remove_from_line(request)
        self._take_place(request.tenant)

    def park(self, request: EngineRequest, ref: AdapterRef) -> None:
        """Beside the lines, until `wake(ref)`."""
        if self._is_in_line(request):
            self._remove_from_line(request)
        self._parked.setdefault(ref, {})[request.request_id] = request
        self.num_parked += 1
        self._num_waiting[request.tenant] += 1

    def wake(self, ref: AdapterRef) -> None:
        for request in self.parked(ref):
            self._unpark(request, ref)
            self._append(request)

    def parked(self, ref: AdapterRef) -> list[EngineRequest]:
        return list(self._parked.get(ref, {}).values())

    def parked_refs(self, basis_id: str) -> list[AdapterRef]:
        """The adapters of one basis that parked requests wait for."""
        return [ref for ref in self._parked if ref.basis_id == basis_id]

    def remove(self, request: EngineRequest) -> None:
        """Out of wherever it waits: it has ended."""
        if self._is_in_line(request):
            self._remove_from_line(request)
        else:
            assert request.adapter is not None
            self._unpark(request, request.adapter)

    def leave(self, request: EngineRequest) -> None:
        """It has ended, and waits no more: its tenant gets back what was charged and not used."""
        unused = request.sampling.max_tokens - request.num_output if request.is_charged else 0
        self._shares.leave(request.tenant, unused_tokens=max(0, unused))
        self._take_place(request.tenant)

    def check_integrity(self, num_running: Mapping[str, int]) -> None:
        """num_running: requests by tenant that were taken and have not ended."""
        assert all(self._lines.values())
        assert all(self._parked.values())
        assert self._turns == sorted(self._turn_of.values())
        assert self._turn_of.keys() == self._lines.keys()
        assert self.num_in_line == sum(len(line) for line in self._lines.values())
        assert self.num_parked == sum(len(group) for group in self._parked.values())
        waiting = Counter(request.tenant for request in self)
        assert self._num_waiting == waiting
        self._shares.check_integrity(waiting + Counter(num_running))

    def _append(self, request: EngineRequest) -> None:
        tenant = request.tenant
        if tenant not in self._lines:
            self._lines[tenant] = OrderedDict()
            self._take_place(tenant)
        self._lines[tenant][request.request_id] = request
        self.num_in_line += 1
        self._num_waiting[tenant] += 1

    def _is_in_line(self, request: EngineRequest) -> bool:
        return request.request_id in self._lines.get(request.tenant, ())

    def _remove_from_line(self, request: EngineRequest) -> None:
        line = self._lines[request.tenant]
        del line[request.request_id]
        self.num_in_line -= 1
        self._count_less(request.tenant)
        if not line:
            del self._lines[request.tenant]
            self._give_up_place(request.tenant)

    def _unpark(self, request: EngineRequest, ref: AdapterRef) -> None:
        del self._parked[ref][request.request_id]
        if not self._parked[ref]:
            del self._parked[ref]
        self.num_parked -= 1
        self._count_less(request.tenant)

    def _count_less(self, tenant: str) -> None:
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]

    def _take_place(self, tenant: str) -> None:
        """Put the tenant's line where its account says, behind those of the same turn."""
        self._give_up_place(tenant)
        if tenant in self._lines:
            turn = (self._shares.starts_at(tenant), next(self._numbers), tenant)
            self._turn_of[tenant] = turn
            bisect.insort(self._turns, turn)

    def _give_up_place(self, tenant: str) -> None:
        turn = self._turn_of.pop(tenant, None)
        if turn is not None:
            del self._turns[bisect.bisect_left(self._turns, turn)]
