"""The queue of waiting requests, fair between tenants.

Each tenant has its own line, and the number of tokens that each tenant has been given decides which line is
next. So a tenant with ten thousand requests delays another tenant's only request by at most the time of one
request. Requests whose adapter or basis has not arrived are parked beside the lines: they delay no other
request, and join the line of their tenant when it has arrived.

The order is deficit round robin over tokens, with rounds of one token and debts:

    charge:  starts_at = max(starts_at, now) + tokens / weight        now = max(now, starts_at before)

A tenant's request may run once the round `starts_at` is reached, and its cost (prompt and longest output) is
owed afterwards. So the first request of a newcomer runs at once, and a tenant is passed over for as many
rounds as it has had tokens. The unused part of the cost is paid back when the request ends. Counting in
rounds of one token instead of a quantum, and skipping rounds in which no tenant may run, is the scheme known
as start-time fair queueing (Goyal, Vin, Cheng 1996): while two tenants wait, the amounts that they were given
differ by at most one request of each.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from service.engine.scheduling.request import EngineRequest
from tessera.formats.adapter_ref import AdapterRef

#: How many requests of one tenant's line one pass examines while those at its front wait for a slot. Bounds
#: the time of a pass (1 µs each); the next step examines the others.
MAX_LOOKAHEAD = 1024

#: The place of a tenant's line in the order: the round in which its next request may run, a running number
#: that puts earlier lines of the same round first, and the tenant.
_Place = tuple[float, int, str]


@dataclass
class _Account:
    #: The round from which on the tenant's next request may run.
    starts_at: float
    #: Number of its requests in the engine.
    num_requests: int = 0


class TenantShares:
    """The accounts of the tenants that have requests in the engine.

    weights: shares by tenant, 1 for those not named. An account lives while its tenant has a request in the
    engine, so there are at most as many accounts as requests. Knows no queue.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._accounts: dict[str, _Account] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._accounts)

    def enter(self, tenant: str) -> None:
        """Count a request of the tenant that came into the engine."""
        self._accounts.setdefault(tenant, _Account(self._now)).num_requests += 1

    def leave(self, tenant: str, *, unused_tokens: int = 0) -> None:
        """Count a request that has ended, and pay back the tokens that were charged for it and not used."""
        account = self._accounts[tenant]
        paid_back = unused_tokens / self._weights.get(tenant, 1.0)
        account.starts_at = max(self._now, account.starts_at - paid_back)
        account.num_requests -= 1
        if account.num_requests == 0:
            del self._accounts[tenant]

    def starts_at(self, tenant: str) -> float:
        """Return the round from which on the tenant's next request may run; the lowest is next.

        It never lies in the past; otherwise a tenant that could not run for a while would keep the others out
        afterwards.
        """
        return max(self._now, self._accounts[tenant].starts_at)

    def charge(self, tenant: str, tokens: int) -> None:
        """Charge the tenant for a request that now runs and may cost this many tokens."""
        self._now = self.starts_at(tenant)
        self._accounts[tenant].starts_at = self._now + max(1, tokens) / self._weights.get(tenant, 1.0)

    def check_integrity(self, num_requests: Mapping[str, int]) -> None:
        """Assert that the accounts agree with `num_requests`, the number of requests by tenant."""
        assert {tenant: a.num_requests for tenant, a in self._accounts.items()} == num_requests


class FairQueue:
    """The requests that do not run: in a line per tenant, or parked by adapter. weights: shares by tenant."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._shares = TenantShares(weights)
        self._lines: dict[str, OrderedDict[str, EngineRequest]] = {}
        self._places: list[_Place] = []  # one per line, ascending
        self._place_of: dict[str, _Place] = {}
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
        """Return the number of one tenant's waiting requests, parked ones included."""
        return self._num_waiting[tenant]

    def enter(self, request: EngineRequest, *, parked_for: AdapterRef | None = None) -> None:
        """Add a new request: at the end of its tenant's line, or beside the lines until
        `wake(parked_for)`."""
        self._shares.enter(request.tenant)
        if parked_for is None:
            self._append(request)
        else:
            self.park(request, parked_for)

    def push_front(self, request: EngineRequest) -> None:
        """Put a request that was running, and has been charged, at the front of its tenant's line."""
        self._append(request)
        self._lines[request.tenant].move_to_end(request.request_id, last=False)

    def candidates(self) -> Iterator[EngineRequest]:
        """Yield the requests in line, in the order of their tenants' places. Starting or parking one in
        between takes effect at once. Passing one over costs its tenant nothing; the next of its line
        follows."""
        cursors: dict[str, Iterator[EngineRequest]] = {}
        index = 0
        while index < len(self._places):
            tenant = self._places[index][2]
            if tenant not in cursors:  # a copy, because the line changes during the iteration
                cursors[tenant] = iter(list(itertools.islice(self._lines[tenant].values(), MAX_LOOKAHEAD)))
            request = next(cursors[tenant], None)
            if request is None:
                index += 1
            else:
                yield request

    def start(self, request: EngineRequest) -> None:
        """Take a request out of its line to run. Its tenant is charged for what is left to compute, once."""
        if not request.is_charged:
            request.is_charged = True
            max_output = request.sampling.max_tokens - request.num_output
            self._shares.charge(request.tenant, request.num_uncomputed + max_output)
        self._remove_from_line(request)
        self._update_place(request.tenant)

    def park(self, request: EngineRequest, ref: AdapterRef) -> None:
        """Put a request beside the lines, until `wake(ref)`."""
        if self._is_in_line(request):
            self._remove_from_line(request)
        self._parked.setdefault(ref, {})[request.request_id] = request
        self.num_parked += 1
        self._num_waiting[request.tenant] += 1

    def wake(self, ref: AdapterRef) -> None:
        """Let the requests that are parked for `ref` join their lines."""
        for request in self.parked(ref):
            self._unpark(request, ref)
            self._append(request)

    def parked(self, ref: AdapterRef) -> list[EngineRequest]:
        return list(self._parked.get(ref, {}).values())

    def parked_refs(self, basis_id: str) -> list[AdapterRef]:
        """Return the adapters of one basis that parked requests wait for."""
        return [ref for ref in self._parked if ref.basis_id == basis_id]

    def remove(self, request: EngineRequest) -> None:
        """Remove a request that has ended from wherever it waits."""
        if self._is_in_line(request):
            self._remove_from_line(request)
        else:
            assert request.adapter is not None
            self._unpark(request, request.adapter)

    def leave(self, request: EngineRequest) -> None:
        """Close the account of a request that has ended and no longer waits: its tenant gets back what was
        charged and not used."""
        unused = request.sampling.max_tokens - request.num_output if request.is_charged else 0
        self._shares.leave(request.tenant, unused_tokens=max(0, unused))
        self._update_place(request.tenant)

    def check_integrity(self, num_running: Mapping[str, int]) -> None:
        """num_running: requests by tenant that were started and have not ended."""
        assert all(self._lines.values())
        assert all(self._parked.values())
        assert self._places == sorted(self._place_of.values())
        assert self._place_of.keys() == self._lines.keys()
        assert self.num_in_line == sum(len(line) for line in self._lines.values())
        assert self.num_parked == sum(len(group) for group in self._parked.values())
        waiting = Counter(request.tenant for request in self)
        assert self._num_waiting == waiting
        self._shares.check_integrity(waiting + Counter(num_running))

    def _append(self, request: EngineRequest) -> None:
        tenant = request.tenant
        if tenant not in self._lines:
            self._lines[tenant] = OrderedDict()
            self._update_place(tenant)
        self._lines[tenant][request.request_id] = request
        self.num_in_line += 1
        self._num_waiting[tenant] += 1

    def _is_in_line(self, request: EngineRequest) -> bool:
        return request.request_id in self._lines.get(request.tenant, ())

    def _remove_from_line(self, request: EngineRequest) -> None:
        line = self._lines[request.tenant]
        del line[request.request_id]
        self.num_in_line -= 1
        self._count_one_less(request.tenant)
        if not line:
            del self._lines[request.tenant]
            self._update_place(request.tenant)

    def _unpark(self, request: EngineRequest, ref: AdapterRef) -> None:
        del self._parked[ref][request.request_id]
        if not self._parked[ref]:
            del self._parked[ref]
        self.num_parked -= 1
        self._count_one_less(request.tenant)

    def _count_one_less(self, tenant: str) -> None:
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]

    def _update_place(self, tenant: str) -> None:
        """Put the tenant's line, if it has one, at the place that its account gives, behind the others of the
        same round."""
        old = self._place_of.pop(tenant, None)
        if old is not None:
            del self._places[bisect.bisect_left(self._places, old)]
        if tenant in self._lines:
            place = (self._shares.starts_at(tenant), next(self._numbers), tenant)
            self._place_of[tenant] = place
            bisect.insort(self._places, place)
