"""The thread that runs the engine. While it runs, other threads call nothing of the engine but `holds`.

    take commands → list what is missing → engine.step() → hand over

Everything that one step produced goes to the asyncio loop in ONE `call_soon_threadsafe`. Without work the
thread sleeps on a condition, but still wakes once a second. `check_progress` notices a step that does not
end. Knows nothing of sockets or Redis.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.engine.engine import Engine
from service.engine.wire.messages import EngineStats, TokenOutput
from tessera.errors import RequestFailed, TesseraError
from tessera.formats.adapter_ref import AdapterRef
from tessera.processes.awake import RunnableTime

logger = logging.getLogger(__name__)

#: Seconds between two snapshots of the statistics, and the longest sleep without work.
STATS_INTERVAL_S = 1.0
#: A check that comes later than this means that the process itself was paused or starved.
_LATE_CHECK_S = 2 * STATS_INTERVAL_S

#: A change to the engine, run between two steps.
Command = Callable[[Engine], None]
#: Called in the asyncio loop after the command, with None or the error that it raised.
CommandReply = Callable[[TesseraError | None], None]


@dataclass
class Delivery:
    """Everything that the thread passes to the asyncio loop in one call."""

    outputs: list[TokenOutput] = field(default_factory=list)
    missing_adapters: list[AdapterRef] = field(default_factory=list)
    missing_bases: list[str] = field(default_factory=list)
    #: The replies to the commands that were run, with what to call them with.
    replies: list[tuple[CommandReply, TesseraError | None]] = field(default_factory=list)
    #: Only when they are due.
    stats: EngineStats | None = None


class EngineThread:
    """Runs `engine` until `stop`. Calls on_delivery and on_failure in the asyncio loop.

    on_failure: the engine raised an error that it does not handle itself (a CUDA error, MemoryError). The
    thread has ended then, and the process cannot serve any more.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_delivery: Callable[[Delivery], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.engine = engine
        self.on_failure = on_failure
        #: Seconds that the running step has taken so far, counting only time in which the thread could run.
        self.stalled_s = 0.0
        self._on_delivery = on_delivery
        self._loop = asyncio.get_running_loop()
        self._inbox: list[tuple[Command, CommandReply | None]] = []
        self._wake = threading.Condition()
        self._is_stopping = False
        self._stats_at = 0.0
        self._is_working = False
        self._num_iterations = self._seen_iteration = 0
        self._checked_at = time.monotonic()
        self._runnable = RunnableTime(None)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._runnable = RunnableTime(os.getpid(), self._thread.native_id)

    def post(self, command: Command, reply: CommandReply | None = None) -> None:
        """Run `command` before the next step. Commands keep their order. Any thread may call this."""
        with self._wake:
            self._inbox.append((command, reply))
            self._wake.notify()

    def check_progress(self) -> None:
        """Update `stalled_s`. The asyncio loop calls this every STATS_INTERVAL_S.

        The time is not simply measured by the clock: after a pause of the process, the thread has not yet had
        a chance to run.
        """
        now = time.monotonic()
        elapsed_s, self._checked_at = now - self._checked_at, now
        runnable_s = self._runnable.since_last_look_s(elapsed_s)
        if not self._is_working or self._num_iterations != self._seen_iteration:
            self._seen_iteration, self.stalled_s = self._num_iterations, 0.0
        elif elapsed_s < _LATE_CHECK_S:
            self.stalled_s += runnable_s

    def stop(self, *, timeout_s: float) -> bool:
        """End the thread after the running step. Return False if that takes longer than `timeout_s`."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._iterate()
        except BaseException as error:
            logger.exception("the engine loop failed")
            self._call_in_loop(self.on_failure, error)

    def _iterate(self) -> None:
        engine = self.engine
        self._is_working = False
        with self._wake:
            if not (self._inbox or self._is_stopping or engine.has_work):
                self._wake.wait(STATS_INTERVAL_S)
            commands, self._inbox = self._inbox, []
        started_at = time.monotonic()
        self._num_iterations += 1
        self._is_working = True
        replies = self._carry_out(commands)
        # Before the step, so that what is missing is fetched meanwhile.
        if replies or engine.has_missing:
            missing = engine.missing_adapters(), engine.missing_bases()
            self._call_in_loop(self._on_delivery, Delivery([], *missing, replies))
        had_work = engine.has_work
        delivery = Delivery(engine.step())
        if engine.has_missing:
            delivery.missing_adapters = engine.missing_adapters()
            delivery.missing_bases = engine.missing_bases()
        has_come_to_rest = (had_work or bool(commands)) and not engine.has_work
        if has_come_to_rest or started_at - self._stats_at >= STATS_INTERVAL_S:
            delivery.stats = engine.stats()
            self._stats_at = started_at
        if delivery.outputs or delivery.missing_adapters or delivery.missing_bases or delivery.stats:
            self._call_in_loop(self._on_delivery, delivery)

    def _carry_out(
        self, commands: list[tuple[Command, CommandReply | None]]
    ) -> list[tuple[CommandReply, TesseraError | None]]:
        replies = []
        for command, reply in commands:
            error: TesseraError | None = None
            try:
                command(self.engine)
            except TesseraError as refusal:
                error = refusal
            except (TypeError, ValueError, KeyError, AttributeError) as fault:
                # A well-formed message with wrong content must fail only its sender.
                logger.exception("a command to the engine failed")
                error = RequestFailed(f"the engine could not take the request: {fault!r}")
            if reply is not None:
                replies.append((reply, error))
        return replies

    def _call_in_loop(self, function: Callable[..., None], argument: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)
