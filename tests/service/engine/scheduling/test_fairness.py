"""Fairness between tenants: which request is next, how much each tenant gets, how many may wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.engine.scheduling.fair_queue import MAX_LOOKAHEAD, FairQueue
from service.engine.scheduling.request import EngineRequest
from service.engine.settings import EngineConfig
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.errors import EngineOverloaded, TenantOverloaded
from tessera.formats.adapter_ref import AdapterRef
from tests.service.engine.driver import GREEDY, Driver
from tests.service.engine.models import Served, family

Start = Callable[..., Driver]
#: The cost of a request: tokens of its prompt, longest output.
Cost = tuple[int, int]
COSTS = st.tuples(st.integers(1, 300), st.integers(0, 300))


class Line:
    """A fair queue. Its requests run as soon as they are started, and end when the test says so."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.line = FairQueue(weights)
        self.running: list[EngineRequest] = []
        self.num_made = 0

    def submit(self, tenant: str, cost: Cost = (1, 1), ref: AdapterRef | None = None) -> EngineRequest:
        params = SamplingParams(max_tokens=cost[1])
        request = GenerationRequest(f"r{self.num_made}", tenant, [1] * cost[0], params, ref)
        request = EngineRequest(request, self.num_made, b"")
        self.num_made += 1
        self.line.enter(request, parked_for=ref)
        return request

    def take(self) -> EngineRequest | None:
        """Start the next request."""
        request = next(self.line.candidates(), None)
        if request is not None:
            self.line.start(request)
            request.is_running = True
            self.running.append(request)
        self.check()
        return request

    def end(self, request: EngineRequest, num_output: int = 0) -> None:
        for token_id in range(num_output):
            request.append(token_id)
        self.running.remove(request)
        request.is_running = False
        self.line.leave(request)
        self.check()

    def check(self) -> None:
        self.line.check_integrity(Counter(request.tenant for request in self.running))


def cost_of(request: EngineRequest) -> int:
    return request.num_prompt + request.sampling.max_tokens


@given(
    num_before=st.integers(0, 30),
    crowds=st.lists(COSTS, min_size=1, max_size=4),
    lonely=COSTS,
)
def test_a_newcomer_waits_for_one_request_of_each_other_tenant_at_most(
    num_before: int, crowds: list[Cost], lonely: Cost
) -> None:
    line = Line()
    for index, cost in enumerate(crowds):
        for _ in range(40):
            line.submit(f"crowd{index}", cost)
    for _ in range(num_before):
        line.take()

    only = line.submit("lonely", lonely)
    taken = []
    while (request := line.take()) is not only:
        assert request is not None
        taken.append(request.tenant)

    assert max(Counter(taken).values(), default=0) <= 1


def test_ten_thousand_requests_delay_another_tenants_only_one_by_one() -> None:
    line = Line()
    for _ in range(10_000):
        line.submit("crowd", (100, 100))
    line.take()
    only = line.submit("lonely", (5000, 3000))

    taken = [line.take(), line.take()]

    assert only in taken


@given(
    costs=st.dictionaries(st.sampled_from("abc"), COSTS, min_size=2),
    weights=st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 3.0])),
    num_taken=st.integers(1, 120),
)
def test_while_tenants_wait_they_get_tokens_by_their_weights(
    costs: dict[str, Cost], weights: dict[str, float], num_taken: int
) -> None:
    line = Line(weights)
    for tenant, cost in costs.items():
        for _ in range(num_taken):
            line.submit(tenant, cost)
    given_tokens: Counter[str] = Counter(dict.fromkeys(costs, 0))
    for _ in range(num_taken):
        request = line.take()
        assert request is not None
        given_tokens[request.tenant] += cost_of(request)

    rounds = {tenant: given_tokens[tenant] / weights.get(tenant, 1.0) for tenant in costs}
    largest = max(sum(cost) / weights.get(tenant, 1.0) for tenant, cost in costs.items())
    assert max(rounds.values()) - min(rounds.values()) <= largest


@given(st.lists(st.tuples(st.sampled_from("abc"), COSTS, st.integers(0, 300)), min_size=1, max_size=60))
def test_every_request_runs_and_those_of_one_tenant_in_their_order(
    traffic: list[tuple[str, Cost, int]],
) -> None:
    line = Line()
    orders: dict[str, list[int]] = {}
    for number, (tenant, cost, num_output) in enumerate(traffic):
        line.submit(tenant, cost)
        if number % 3 == 0 and (request := line.take()) is not None:
            orders.setdefault(request.tenant, []).append(request.number)
            line.end(request, min(num_output, request.sampling.max_tokens))
    while (request := line.take()) is not None:
        orders.setdefault(request.tenant, []).append(request.number)

    assert sum(len(order) for order in orders.values()) == len(traffic)
    assert all(order == sorted(order) for order in orders.values())
    for request in list(line.running):
        line.end(request)
    line.line.check_integrity({})  # no account is left either


def test_what_a_request_did_not_use_is_paid_back() -> None:
    line = Line()
    for tenant in ("frugal", "honest"):
        for _ in range(3):
            line.submit(tenant, (10, 1000 if tenant == "frugal" else 10))
    first = line.take()
    assert first is not None
    assert first.tenant == "frugal"
    line.end(first, num_output=2)  # it cost 12 tokens, not 1010

    # type: ignore[union-attr]
    assert [line.take().tenant for _ in range(4)] == ["honest", "frugal", "honest", "honest"]


def test_a_preempted_request_is_charged_once_and_comes_back_first() -> None:
    line = Line()
    first, second = line.submit("a", (100, 100)), line.submit("a")
    line.take()
    line.running.remove(first)
    first.is_running = False
    line.line.push_front(first)
    assert list(line.line.candidates()) == [first, second]
    line.take()
    other = line.submit("b")

    assert line.take() is other
    line.end(first)
    line.end(other)


def test_a_tenant_that_could_not_run_does_not_keep_others_out_afterwards() -> None:
    line = Line()
    blocked = [line.submit("blocked", (50, 50)) for _ in range(20)]
    others = [line.submit("other", (50, 50)) for _ in range(40)]
    for _ in range(20):  # its requests are passed over, as if all slots were pinned
        request = next(s for s in line.line.candidates() if s.tenant == "other")
        line.line.start(request)
        request.is_running = True
        line.running.append(request)

    taken = [line.take() for _ in range(10)]

    assert Counter(s in blocked for s in taken) == {True: 5, False: 5}
    assert others


def test_passing_over_a_long_line_is_bounded() -> None:
    line = Line()
    for _ in range(MAX_LOOKAHEAD + 10):
        line.submit("crowd")
    line.submit("other")

    seen = Counter(request.tenant for request in line.line.candidates())

    assert seen == {"crowd": MAX_LOOKAHEAD, "other": 1}


def test_parked_requests_count_and_leave_no_trace() -> None:
    line = Line()
    ref = AdapterRef("t", "a", 1, "basis")
    parked = [line.submit("t", ref=ref) for _ in range(3)]
    assert (line.line.num_waiting("t"), line.line.num_parked, len(line.line)) == (3, 3, 3)
    line.line.wake(ref)
    line.line.park(parked[1], ref)
    assert (line.line.num_in_line, line.line.num_parked) == (2, 1)
    for request in parked:
        line.line.remove(request)
        line.line.leave(request)
    line.line.check_integrity({})
    assert line.line.num_waiting("t") == 0


@pytest.fixture
def micro() -> Served:
    return family("micro")


def test_one_tenant_cannot_fill_the_queue(micro: Served, start: Start) -> None:
    driver = start(micro, max_waiting=5, max_waiting_per_tenant=3, max_batch_seqs=1)
    for _ in range(3):
        driver.submit([1, 2], tenant="crowd")
    with pytest.raises(TenantOverloaded, match="already has 3 waiting requests"):
        driver.submit([1, 2], tenant="crowd")
    for _ in range(2):
        driver.submit([1, 2], tenant="other")
    with pytest.raises(EngineOverloaded):
        driver.submit([1, 2], tenant="third")
    driver.run()
    driver.submit([1, 2], tenant="crowd")
    driver.run()


def test_tokens_count_and_not_requests(micro: Served, start: Start) -> None:
    """While both tenants wait, ten short requests run for each one that costs ten times as much."""
    driver = start(micro, max_batch_seqs=1)
    short, long = replace(GREEDY, max_tokens=2), replace(GREEDY, max_tokens=38)
    for _ in range(3):
        driver.submit([1] * 2, long, tenant="long")
    for _ in range(30):
        driver.submit([1] * 2, short, tenant="short")
    order = []
    while driver.engine.has_work:
        order += [driver.answers[o.request_id].outputs[0] for o in driver.step() if o.finish_reason]
    tenants = ["long" if len(driver.answers[o.request_id].token_ids) == 38 else "short" for o in order]

    assert [index for index, tenant in enumerate(tenants) if tenant == "long"] == [0, 11, 22]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")], ids=str)
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValidationError, match=r"tenant_weights\.acme"):
        EngineConfig(tenant_weights={"acme": weight})
