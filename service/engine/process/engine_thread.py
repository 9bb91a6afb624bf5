"""The thread that turns the engine's loop, and the only one that touches the engine.

    take commands → ask for what is missing → engine.step() → hand over

All that one step brought goes to the asyncio loop in ONE `call_soon_threadsafe`. Without work the thread
sleeps on a condition, but turns once a second all the same. A step that does not end is noticed by `look`.
Knows nothing of sockets or Redis.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from service.engine.engine import Engine
from service.engine.wire.messages import EngineStats, TokenOutput
from tessera.errors import RequestFailed, TesseraError
from tessera.formats.adapter_ref import AdapterRef
from tessera.processes.awake import RunnableTime

logger = logging.getLogger(__name__)

#: How often the figures are taken, and the longest sleep without work.
STATS_INTERVAL_S = 1.0
#: A look that comes later than this says that the process itself was paused or starved.
_LATE_LOOK_S = 2 * STATS_INTERVAL_S

#: A change to the engine, run between two steps.
Command = Callable[[Engine], None]
#: Run in the asyncio loop after the command: None, or the error that it raised.
Reply = Callable[[TesseraError | None], None]


@dataclass
class Turn:
    """What one turn of the loop brought. stats only where they are due."""

    outputs: list[TokenOutput] = field(default_factory=list)
    missing_adapters: list[AdapterRef] = field(default_factory=list)
    missing_bases: list[str] = field(default_factory=list)
    replies: list[tuple[Reply, TesseraError | None]] = field(default_factory=list)
    stats: EngineStats | None = None

    @property
    def is_empty(self) -> bool:
        return not (
            self.outputs
            or self.missing_adapters
            or self.missing_bases
            or self.replies
            or self.stats is not None
        )


class EngineThread:
    """Turns `engine`'s loop until `stop`. on_turn and on_failure are called in the asyncio loop.

    on_failure: the engine raised what it does not handle itself (a CUDA error, MemoryError). The thread has
    ended then and the process is of no more use.
    """

    def __init__(
        self, engine: Engine, *, on_turn: Callable[[Turn], None], on_failure: Callable[[BaseException], None]
    ) -> None:
        self._engine = engine
        self._on_turn = on_turn
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._inbox: list[tuple[Command, Reply | None]] = []
        self._wake = threading.Condition()
        self._is_stopping = False
        self._turned_at = time.monotonic()
        self._stats_at = 0.0
        #: Seconds, of those in which the thread could run, that the running step has taken so far.
        self.stalled_s = 0.0
        self._is_working = False
        self._num_turns = self._seen_turn = 0
        self._looked_at = time.monotonic()
        self._runnable = RunnableTime(None)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._runnable = RunnableTime(os.getpid(), self._thread.native_id)

    def post(self, command: Command, reply: Reply | None = None) -> None:
        """Have `command` run before the next step. Commands keep their order. Any thread may call this."""
        with self._wake:
            self._inbox.append((command, reply))
            self._wake.notify()

    def look(self) -> None:
        """Bring `stalled_s` up to date; for the asyncio loop, every STATS_INTERVAL_S.

        Not read off the clock: after a pause of the process the thread has not had a chance to turn yet.
        """
        now = time.monotonic()
        elapsed_s, self._looked_at = now - self._looked_at, now
        runnable_s = self._runnable.since_last_look_s(elapsed_s)
        if not self._is_working or self._num_turns != self._seen_turn:
            self._seen_turn, self.stalled_s = self._num_turns, 0.0
        elif elapsed_s < _LATE_LOOK_S:
            self.stalled_s += runnable_s

    def stop(self, *, timeout_s: float) -> bool:
        """End after the running step. False if that takes longer than `timeout_s`."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._turn()
        except BaseException as error:
            logger.exception("the engine loop failed")
            self._call_in_loop(self._on_failure, error)

    def _turn(self) -> None:
        self._is_working = False
        commands = self._take_commands()
        self._turned_at = time.monotonic()
        self._num_turns += 1
        self._is_working = True
        # Before the step, so that what is missing is fetched meanwhile.
        self._hand_over(Turn(replies=self._carry_out(commands), **self._missing()))
        had_work = self._engine.has_work
        turn = Turn(outputs=self._engine.step(), **self._missing())
        has_come_to_rest = (had_work or bool(commands)) and not self._engine.has_work
        if has_come_to_rest or self._turned_at - self._stats_at >= STATS_INTERVAL_S:
            turn.stats = self._engine.stats()
            self._stats_at = self._turned_at
        self._hand_over(turn)

    def _missing(self) -> dict[str, Any]:
        return {
            "missing_adapters": self._engine.missing_adapters(),
            "missing_bases": self._engine.missing_bases(),
        }

    def _take_commands(self) -> list[tuple[Command, Reply | None]]:
        with self._wake:
            if not (self._inbox or self._is_stopping or self._engine.has_work):
                self._wake.wait(STATS_INTERVAL_S)
            commands, self._inbox = self._inbox, []
        return commands

    def _carry_out(
        self, commands: list[tuple[Command, Reply | None]]
    ) -> list[tuple[Reply, TesseraError | None]]:
        replies = []
        for command, reply in commands:
            error: TesseraError | None = None
            try:
                command(self._engine)
            except TesseraError as refused:
                error = refused
            except (TypeError, ValueError, KeyError, AttributeError) as fault:
                # A message of the right form with the wrong content: it may cost its sender, nobody else.
                logger.exception("a command to the engine failed")
                error = RequestFailed(f"the engine could not take the request: {fault!r}")
            if reply is not None:
                replies.append((reply, error))
        return replies

    def _hand_over(self, turn: Turn) -> None:
        if not turn.is_empty:
            self._call_in_loop(self._on_turn, turn)

    def _call_in_loop(self, function: Callable[..., None], argument: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)
