"""The engine's thread, around a small engine whose steps the test controls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from service.engine.process.engine_thread import Delivery, EngineThread
from service.engine.wire.messages import EngineStats, GenerationRequest, SamplingParams, TokenOutput
from tessera.errors import EngineOverloaded, RequestFailed, TesseraError
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tests.waiting import HANG_S, wait_until


class FakeEngine:
    """Gives every request one token per step, up to its max_tokens. `before_step` may block or raise."""

    def __init__(self, before_step: Callable[[], object] = lambda: None) -> None:
        self.before_step = before_step
        self.num_steps = 0
        self.num_looks = 0
        self._left: dict[str, int] = {}
        self._missing: list[AdapterRef] = []

    def submit(self, request: GenerationRequest) -> None:
        if request.tenant == "crowd":
            raise EngineOverloaded("full")
        if request.adapter is not None:
            self._missing.append(request.adapter)
        self._left[request.request_id] = request.sampling.max_tokens

    def cancel(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    @property
    def has_missing(self) -> bool:
        self.num_looks += 1
        return bool(self._missing)

    def missing_adapters(self) -> list[AdapterRef]:
        missing, self._missing = self._missing, []
        return missing

    def provide_adapter(self, ref: AdapterRef, adapter: Adapter | TesseraError) -> None:
        pass

    def missing_bases(self) -> list[str]:
        return []

    def provide_basis(self, basis_id: str, basis: Basis | TesseraError) -> None:
        pass

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def step(self) -> list[TokenOutput]:
        if not self._left:
            return []
        self.before_step()
        self.num_steps += 1
        for request_id in self._left:
            self._left[request_id] -= 1
        outputs = [
            TokenOutput(request_id, [self.num_steps], finish_reason=None if left else "length")
            for request_id, left in self._left.items()
        ]
        self._left = {request_id: left for request_id, left in self._left.items() if left}
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._left), steps_total=self.num_steps)


class Desk:
    """Collects what the thread delivers to the asyncio loop."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.failure: BaseException | None = None

    def on_delivery(self, delivery: Delivery) -> None:
        for reply, error in delivery.replies:
            reply(error)
        self.deliveries.append(delivery)

    def on_failure(self, error: BaseException) -> None:
        self.failure = error

    @property
    def outputs(self) -> list[TokenOutput]:
        return [output for delivery in self.deliveries for output in delivery.outputs]

    @property
    def last_stats(self) -> EngineStats | None:
        return next((each.stats for each in reversed(self.deliveries) if each.stats is not None), None)


@asynccontextmanager
async def running(engine: FakeEngine) -> AsyncIterator[tuple[EngineThread, Desk]]:
    desk = Desk()
    # type: ignore[arg-type]
    thread = EngineThread(engine, on_delivery=desk.on_delivery, on_failure=desk.on_failure)
    thread.start()
    try:
        yield thread, desk
    finally:
        assert await asyncio.to_thread(thread.stop, timeout_s=HANG_S)


def request(
    request_id: str, *, max_tokens: int = 3, tenant: str = "t", adapter: AdapterRef | None = None
) -> GenerationRequest:
    return GenerationRequest(request_id, tenant, [1], SamplingParams(max_tokens=max_tokens), adapter=adapter)


async def test_outputs_come_in_one_hand_over_per_step() -> None:
    engine = FakeEngine()
    async with running(engine) as (thread, desk):
        # A single command, so that both requests are there before the first step.
        # type: ignore[arg-type,return-value]
        thread.post(lambda e: [e.submit(request("a")), e.submit(request("b"))])
        await wait_until(lambda: len(desk.outputs) == 6)

    assert [len(each.outputs) for each in desk.deliveries if each.outputs] == [2, 2, 2]
    assert [output.finish_reason for output in desk.outputs] == [None] * 4 + ["length"] * 2


async def test_without_work_the_thread_sleeps() -> None:
    engine = FakeEngine()
    async with running(engine) as (thread, desk):
        thread.post(lambda e: e.submit(request("a")))
        await wait_until(lambda: len(desk.outputs) == 3)
        looks = engine.num_looks
        await asyncio.sleep(0.5)

        assert engine.num_looks - looks <= 2
        assert engine.num_steps == 3


async def test_the_figures_follow_as_soon_as_the_work_is_done() -> None:
    async with running(FakeEngine()) as (thread, desk):
        thread.post(lambda e: e.submit(request("a")))

        await wait_until(lambda: desk.last_stats == EngineStats(num_running=0, steps_total=3), 0.9)


async def test_a_refusal_reaches_its_sender_only() -> None:
    refusals: list[tuple[str, TesseraError | None]] = []
    async with running(FakeEngine()) as (thread, desk):
        thread.post(
            lambda e: e.submit(request("a", tenant="crowd")), lambda error: refusals.append(("a", error))
        )
        thread.post(lambda e: e.submit(request("b")), lambda error: refusals.append(("b", error)))
        await wait_until(lambda: len(desk.outputs) == 3)

    assert [(name, type(error)) for name, error in refusals] == [("a", EngineOverloaded), ("b", type(None))]


async def test_a_request_of_wrong_types_costs_nobody_else() -> None:
    refusals: list[TesseraError | None] = []
    async with running(FakeEngine()) as (thread, desk):
        thread.post(lambda e: e.submit(None), refusals.append)  # type: ignore[arg-type]
        thread.post(lambda e: e.submit(request("b")))
        await wait_until(lambda: len(desk.outputs) == 3)

    assert [type(error) for error in refusals] == [RequestFailed]
    assert desk.failure is None


async def test_missing_adapters_are_delivered() -> None:
    ref = AdapterRef("t", "tone", 1, "00" * 32)
    async with running(FakeEngine()) as (thread, desk):
        thread.post(lambda e: e.submit(request("a", adapter=ref)))
        await wait_until(lambda: any(each.missing_adapters == [ref] for each in desk.deliveries))


def stalled_s(thread: EngineThread) -> float:
    thread.check_progress()
    return thread.stalled_s


async def test_a_step_that_hangs_is_seen_and_the_others_are_not() -> None:
    gate = threading.Event()
    async with running(FakeEngine(before_step=lambda: gate.wait(HANG_S))) as (thread, desk):
        assert stalled_s(thread) == 0, "a thread without work is in no step"
        thread.post(lambda e: e.submit(request("a", max_tokens=1)))

        await wait_until(lambda: stalled_s(thread) > 0.5)
        gate.set()
        await wait_until(lambda: desk.outputs and stalled_s(thread) == 0)


async def test_a_pause_of_the_process_is_no_hung_step() -> None:
    """A late check counts nothing, because the thread could not run either."""
    gate = threading.Event()
    async with running(FakeEngine(before_step=lambda: gate.wait(HANG_S))) as (thread, desk):
        thread.post(lambda e: e.submit(request("a", max_tokens=1)))
        await wait_until(lambda: stalled_s(thread) > 0)
        before = thread.stalled_s
        thread._checked_at -= 90.0  # as if the last check had been before the pause
        thread.check_progress()
        assert thread.stalled_s == before
        gate.set()
        await wait_until(lambda: desk.outputs)


async def test_what_the_engine_does_not_survive_is_reported_once() -> None:
    def out_of_memory() -> None:
        raise MemoryError("no more")

    async with running(FakeEngine(before_step=out_of_memory)) as (thread, desk):
        thread.post(lambda e: e.submit(request("a")))
        await wait_until(lambda: desk.failure is not None)

    assert isinstance(desk.failure, MemoryError)
