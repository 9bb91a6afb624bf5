"""One API process' end of the engine's socket: requests go out, outputs come in, each to its reader.

Knows nothing of how the engine process is started or by whom: `engine_client.py` starts one, `attachment.py`
finds one. Knows no HTTP and no text.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from service.engine.client.output_stream import Backlog, OutputStream
from service.engine.client.supervisor import Heartbeat
from service.engine.wire import ipc
from service.engine.wire.messages import EngineInfo, EngineStats, GenerationRequest, TokenOutput
from tessera.errors import EngineUnavailable, InvalidInput, RequestFailed, TesseraError

CONNECT_POLL_S = 0.05
#: For the engine to confirm what is not generation: it does so between two steps.
CALL_TIMEOUT_S = 10.0

#: Of outputs that slow readers of this process have not fetched, by a rough reckoning. The engine cannot wait
#: for a reader, so beyond this the slowest one's request is ended.
MAX_BACKLOG_BYTES = 128 * 1024**2

#: What callers are told. The reasons name paths and addresses: they are for `starting_error` and the log.
NOT_READY = "the engine is starting; try again later"
TOO_SLOW = "the answer was read too slowly, and more of it waits than there is memory for"
DIED = "the engine ended while it worked on this request; it is being started again"


class EngineConnection:
    """The engine, as far as it can be talked to. heartbeat: beats with every message.

    stats: the latest figures, None while no engine is connected. stalled_s: for how long of the time in which
    it could run it has, by its own word, not come to the end of a step. starting_error: why it is not ready,
    in words; None when it is. failure: why the process said that it would end.
    """

    def __init__(self, heartbeat: Heartbeat, *, heartbeat_timeout_s: float) -> None:
        self.max_backlog_bytes = MAX_BACKLOG_BYTES
        self.stats: EngineStats | None = None
        self.stalled_s = 0.0
        self.starting_error: str | None = "the engine has not been started"
        self.failure: str | None = None
        self._heartbeat = heartbeat
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._info: EngineInfo | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._streams: dict[str, OutputStream] = {}
        self._backlog = Backlog()
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._call_numbers = itertools.count()
        self._ready = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        return self._info is not None

    @property
    def info(self) -> EngineInfo:
        """What the engine is. Raises `EngineUnavailable` until it is ready."""
        if self._info is None:
            raise EngineUnavailable(NOT_READY)
        return self._info

    async def wait_ready(self, timeout_s: float) -> EngineInfo:
        """Wait until the engine serves. Raises `EngineUnavailable` with the reason after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError as error:
            raise EngineUnavailable(f"not ready within {timeout_s:g} s: {self.starting_error}") from error
        return self.info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Continue one sequence; the last output has a finish_reason. Closing the iterator cancels it.

        Outputs that a slow reader did not take in time arrive as one. Raises `EngineUnavailable` if there is
        no engine or it dies, and what the engine refuses a request with: `InvalidInput`, `EngineOverloaded`,
        `TenantOverloaded`.
        """
        _ = self.info
        assert request.request_id not in self._streams, "request ids are unique"
        stream = self._streams[request.request_id] = OutputStream(self._backlog)
        try:
            await self._submit(request)
            while not (output := await stream.next()).finish_reason:
                yield output
            yield output
        finally:
            del self._streams[request.request_id]
            stream.drop()
            if not stream.is_finished:
                self._send(ipc.encode("cancel", request_id=request.request_id))

    async def unload(self, tenant: str, adapter_id: str) -> None:
        """Drop an adapter's copies in the engine; those in use go when their requests end.

        Raises `EngineUnavailable` if the engine does not confirm in time. An engine that is not running, or
        dies meanwhile, holds no copies.
        """
        await self._call("unload", tenant=tenant, adapter_id=adapter_id)

    async def check_integrity(self) -> None:
        """Have the engine check its books between two steps. Raises `RequestFailed` with code
        "integrity_violated", or `EngineUnavailable`. For benchmarks and tests: it reads every block and slot.
        """
        await self._call("check")

    async def talk(self, socket: Path) -> None:
        """Connect and read, again if the connection is cut, until cancelled. Raises `ipc.FrameError` if the
        peer speaks nonsense."""
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(socket)
                while (message := await ipc.read_frame(reader)) is not None:
                    self._heartbeat.beat()
                    self._on_message(message)
            except (FileNotFoundError, ConnectionError):
                pass  # not there yet, or its end: the caller watches the process
            if self._writer is not None:
                self.disconnect(self.failure or "the engine closed the connection")
            await asyncio.sleep(CONNECT_POLL_S)

    async def silent(self, pid: Callable[[], int | None]) -> None:
        """Return once the engine has been silent for too long and leaves a ping unanswered. pid: its process,
        if it is known."""
        await self._heartbeat.missed(
            pid=pid, is_idle=self._is_idle, ask=lambda: self._send(ipc.encode("ping"))
        )

    def disconnect(self, reason: str) -> None:
        """The engine is out of reach: so say all who wait for it."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._writer = self._info = self.stats = None
        self._ready.clear()
        self.starting_error = reason
        for stream in self._streams.values():
            stream.fail(EngineUnavailable(DIED))
        for done in self._calls.values():
            if not done.done():
                done.set_result(None)

    async def _call(self, kind: str, **fields: Any) -> None:
        """Send what is answered by one message, and wait for it. Returns at once while there is no engine."""
        if not self.is_ready:
            return
        number = next(self._call_numbers)
        done = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(ipc.encode(kind, id=number, **fields))
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await done
        except TimeoutError as error:
            raise EngineUnavailable(f"the engine did not confirm within {CALL_TIMEOUT_S:g} s") from error
        finally:
            del self._calls[number]

    async def _submit(self, request: GenerationRequest) -> None:
        try:
            frame = ipc.encode("submit", request=ipc.request_map(request))
        except ipc.FrameError as error:
            raise InvalidInput(f"the request cannot be sent to the engine: {error}") from error
        self._send(frame)
        writer = self._writer
        if writer is not None:
            with contextlib.suppress(ConnectionError):  # then `disconnect` tells the stream
                await writer.drain()

    def _is_idle(self) -> bool:
        """Whether nobody waits for the engine: nobody here, and by its last word nobody elsewhere."""
        stats = self.stats
        is_busy = stats is None or stats.num_running + stats.num_waiting > 0
        return not (is_busy or self._streams or self._calls)

    def _send(self, frame: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame)

    def _on_message(self, message: dict[str, Any]) -> None:
        """Act on one message. Raises `ipc.FrameError`."""
        try:
            match message["type"]:
                case "outputs":
                    for row in message["outputs"]:
                        self._on_output(ipc.output_from_row(row))
                case "stats":
                    self.stats = EngineStats.from_map(message["stats"])
                    self.stalled_s = float(message["stalled_s"])
                case "refused":
                    if (stream := self._streams.get(message["request_id"])) is not None:
                        stream.fail(ipc.error_from_map(message["error"]))
                case "done":
                    error = message["error"]
                    self._on_done(message["id"], None if error is None else ipc.error_from_map(error))
                case "ready":
                    self._on_ready(EngineInfo.from_map(message["info"]))
                case "starting":
                    self.starting_error = message["reason"]
                case "failed":
                    self.failure = ipc.error_from_map(message["error"]).message
        except (KeyError, TypeError, ValueError) as error:
            raise ipc.FrameError(f"a {message['type']} message that cannot be read: {error!r}") from error

    def _on_output(self, output: TokenOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        stream.put(output)
        if self._backlog.num_bytes > self.max_backlog_bytes:
            self._cut_the_slowest()

    def _cut_the_slowest(self) -> None:
        """End the request whose reader has fetched least of what has come."""
        request_id, stream = max(self._streams.items(), key=lambda item: item[1].num_bytes)
        if not stream.is_finished:
            self._send(ipc.encode("cancel", request_id=request_id))
        stream.cut(RequestFailed(TOO_SLOW, code="reader_too_slow"))

    def _on_done(self, number: int, error: TesseraError | None) -> None:
        done = self._calls.get(number)
        if done is None or done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def _on_ready(self, info: EngineInfo) -> None:
        self._info = info
        self.starting_error = None
        self._heartbeat.timeout_s = self._heartbeat_timeout_s
        self._ready.set()
