"""The API process' end of the engine's socket: requests go out, outputs come in, each to its reader.

A reader may be slow, so outputs wait in a stream of their own per request. Knows nothing of how the engine
process is started or by whom: `engine_client.py` starts one, `attachment.py` finds one. Knows no HTTP and no
text.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from service.engine.client.engine_child import Heartbeat
from service.engine.wire import ipc
from service.engine.wire.messages import EngineInfo, EngineStats, GenerationRequest, TokenOutput
from tessera.errors import EngineUnavailable, InvalidInput, RequestFailed, TesseraError

CONNECT_POLL_S = 0.05
#: How long the engine may take to confirm an unload or a check, which it does between two steps.
CALL_TIMEOUT_S = 10.0

#: Estimated bytes of outputs that slow readers of this process have not read. The engine cannot wait for a
#: reader, so above this limit the request of the slowest reader is ended.
MAX_BACKLOG_BYTES = 128 * 1024**2

#: Messages for callers. Reasons that name paths and addresses go to `starting_error` and the log only.
NOT_READY = "the engine is starting; try again later"
TOO_SLOW = "the answer was read too slowly, and its unread part exceeds the memory limit"
DIED = "the engine ended while it worked on this request; it is being restarted"

#: Outputs of one slow reader that are kept separately. Later ones are merged, which takes far less memory.
MAX_APART = 32
#: Estimated size of Python objects: a token id in a list, an entry of log-probabilities, one alternative in
#: it.
_TOKEN_BYTES, _ENTRY_BYTES, _ALTERNATIVE_BYTES = 40, 150, 120


class Backlog:
    """The estimated memory of outputs that the readers of all streams of a process have not read."""

    num_bytes = 0


class OutputStream:
    """The outputs of one request on their way to its reader. Ends with the first finish_reason or error.

    backlog: counts what waits here together with the other streams.
    """

    def __init__(self, backlog: Backlog | None = None) -> None:
        self.is_finished = False
        #: The part of this stream in the backlog.
        self.num_bytes = 0
        self._backlog = backlog or Backlog()
        self._pending: list[TokenOutput] = []
        self._error: TesseraError | None = None
        self._changed = asyncio.Event()

    def put(self, output: TokenOutput) -> None:
        """Add an output for the reader. Does nothing after the end."""
        if self.is_finished:
            return
        self.is_finished = output.finish_reason is not None
        size = _size(output)
        self.num_bytes += size
        self._backlog.num_bytes += size
        if len(self._pending) < MAX_APART:
            self._pending.append(output)
        else:
            _append(self._pending[-1], output)
        self._changed.set()

    def fail(self, error: TesseraError) -> None:
        """End the stream: the reader gets what it has not read, then `error`. Does nothing after the end."""
        if self.is_finished:
            return
        self.is_finished = True
        self._error = error
        self._changed.set()

    def cut(self, error: TesseraError) -> None:
        """End the stream with `error`, and drop what the reader has not read."""
        self.take()
        self.is_finished, self._error = True, error
        self._changed.set()

    async def next(self) -> TokenOutput:
        """Wait for outputs, and return those since the last call as one. Raises the error passed to
        `fail`."""
        await self._changed.wait()
        self._changed.clear()
        if self._pending:
            outputs = self.take()
            if self._error is not None:
                self._changed.set()
            return outputs[0] if len(outputs) == 1 else merge_outputs(outputs)
        assert self._error is not None
        raise self._error

    def take(self) -> list[TokenOutput]:
        """Take the outputs that the reader has not read."""
        self._backlog.num_bytes -= self.num_bytes
        outputs, self._pending, self.num_bytes = self._pending, [], 0
        return outputs


class EngineConnection:
    """The engine behind a socket. heartbeat: beats with every message. max_stalled_s: `talk` fails if one
    step takes longer."""

    def __init__(
        self, heartbeat: Heartbeat, *, heartbeat_timeout_s: float, max_stalled_s: float = math.inf
    ) -> None:
        self.max_backlog_bytes = MAX_BACKLOG_BYTES
        #: The latest statistics; None while no engine is connected.
        self.stats: EngineStats | None = None
        #: How long the engine's running step has taken by its report, counting only time in which it could
        #: run.
        self.stalled_s = 0.0
        #: Why the engine is not ready, in words; None when it is.
        self.starting_error: str | None = "the engine has not been started"
        #: Why the process announced that it would end.
        self.failure: str | None = None
        self._max_stalled_s = max_stalled_s
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
        """The model, device and limits of the engine. Raises `EngineUnavailable` until it is ready."""
        if self._info is None:
            raise EngineUnavailable(NOT_READY)
        return self._info

    async def wait_ready(self, timeout_s: float) -> EngineInfo:
        """Wait until the engine is ready. Raises `EngineUnavailable` with the reason after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError as error:
            raise EngineUnavailable(f"not ready within {timeout_s:g} s: {self.starting_error}") from error
        return self.info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Yield the outputs of one request; the last has a finish_reason. Closing the iterator cancels the
        request.

        A slow reader gets several outputs as one. Raises `EngineUnavailable` if there is no engine or it
        dies, and the errors by which the engine refuses a request: `InvalidInput`, `EngineOverloaded`,
        `TenantOverloaded`.
        """
        if self._info is None:
            raise EngineUnavailable(NOT_READY)
        assert request.request_id not in self._streams, "request ids are unique"
        stream = self._streams[request.request_id] = OutputStream(self._backlog)
        try:
            try:
                frame = ipc.encode("submit", request=ipc.request_map(request))
            except ipc.FrameError as error:
                raise InvalidInput(f"the request cannot be sent to the engine: {error}") from error
            writer = self._writer
            if writer is not None and not writer.is_closing():
                writer.write(frame)
                with contextlib.suppress(ConnectionError):  # `disconnect` fails the stream
                    await writer.drain()
            while not (output := await stream.next()).finish_reason:
                yield output
            yield output
        finally:
            del self._streams[request.request_id]
            stream.take()
            if not stream.is_finished:
                self._send(ipc.encode("cancel", request_id=request.request_id))

    async def unload(self, tenant: str, adapter_id: str) -> None:
        """Drop the copies of an adapter in the engine; those in use are dropped when their requests end.

        Raises `EngineUnavailable` if the engine does not confirm in time. An engine that does not run, or
        dies meanwhile, holds no copies.
        """
        await self._call("unload", tenant=tenant, adapter_id=adapter_id)

    async def check_integrity(self) -> None:
        """Let the engine check its books between two steps. Raises `RequestFailed` with the code
        "integrity_violated", or `EngineUnavailable`. For benchmarks and tests: it reads every block and slot.
        """
        await self._call("check")

    async def talk(self, socket: Path) -> None:
        """Connect and read until cancelled; connect again if the connection is cut. Raises `ipc.FrameError`
        if the peer breaks the protocol, and `EngineUnavailable` if it is stuck in a step."""
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(socket)
                while (message := await ipc.read_frame(reader)) is not None:
                    self._heartbeat.num_beats += 1
                    self._on_message(message)
            except (FileNotFoundError, ConnectionError):
                pass  # it is not there yet, or has ended: the caller watches the process
            if self._writer is not None:
                self.disconnect(self.failure or "the engine closed the connection")
            await asyncio.sleep(CONNECT_POLL_S)

    async def wait_until_silent(self, pid: Callable[[], int | None]) -> None:
        """Return once the engine has been silent for too long and has left a ping unanswered. pid: its
        process, if it is known."""
        await self._heartbeat.wait_until_missed(
            pid=pid, is_idle=self._is_idle, ask=lambda: self._send(ipc.encode("ping"))
        )

    def disconnect(self, reason: str) -> None:
        """Forget the connection, and fail everything that waits for the engine."""
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
        """Send a message that is answered by one message, and wait for the answer. Returns at once while
        there is no engine."""
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

    def _is_idle(self) -> bool:
        """Whether nothing waits for the engine, neither here nor, by its latest statistics, elsewhere."""
        stats = self.stats
        is_busy = stats is None or stats.num_running + stats.num_waiting > 0
        return not (is_busy or self._streams or self._calls)

    def _send(self, frame: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame)

    def _on_message(self, message: dict[str, Any]) -> None:
        """Act on one message. Raises `ipc.FrameError` or `EngineUnavailable`, see `talk`."""
        try:
            match message["type"]:
                case "outputs":
                    for row in message["outputs"]:
                        output = ipc.output_from_row(row)
                        if (stream := self._streams.get(output.request_id)) is not None:
                            stream.put(output)
                    while self._backlog.num_bytes > self.max_backlog_bytes:
                        self._cut_slowest()
                case "stats":
                    self.stats = EngineStats(**message["stats"])
                    self.stalled_s = float(message["stalled_s"])
                    if self.stalled_s > self._max_stalled_s:
                        raise EngineUnavailable(
                            f"the engine has not come to the end of a step for {self.stalled_s:.0f} s"
                        )
                case "refused":
                    if (stream := self._streams.get(message["request_id"])) is not None:
                        stream.fail(ipc.error_from_map(message["error"]))
                case "done":
                    error = message["error"]
                    self._on_done(message["id"], None if error is None else ipc.error_from_map(error))
                case "ready":
                    self._on_ready(EngineInfo(**message["info"]))
                case "starting":
                    self.starting_error = message["reason"]
                case "failed":
                    self.failure = ipc.error_from_map(message["error"]).message
        except (KeyError, TypeError, ValueError) as error:
            raise ipc.FrameError(f"unreadable {message['type']} message: {error!r}") from error

    def _cut_slowest(self) -> None:
        """End the request with the most unread outputs."""
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


def merge_outputs(outputs: Sequence[TokenOutput]) -> TokenOutput:
    """Merge outputs of one request, given in order, into one, for a slow reader."""
    last = outputs[-1]
    prompts = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return TokenOutput(
        last.request_id,
        [token for output in outputs for token in output.token_ids],
        [entry for output in outputs for entry in output.logprobs],
        prompts[0] if prompts else None,
        last.finish_reason,
        last.error,
        max(output.num_cached_tokens for output in outputs),
        max(output.num_distinct for output in outputs),
    )


def _append(output: TokenOutput, later: TokenOutput) -> None:
    """Merge `later` into `output`, to which there is no other reference."""
    output.token_ids += later.token_ids
    output.logprobs += later.logprobs
    output.prompt_logprobs = output.prompt_logprobs or later.prompt_logprobs
    output.finish_reason, output.error = later.finish_reason, later.error
    output.num_cached_tokens = max(output.num_cached_tokens, later.num_cached_tokens)
    output.num_distinct = max(output.num_distinct, later.num_distinct)


def _size(output: TokenOutput) -> int:
    entries = output.logprobs if output.prompt_logprobs is None else output.logprobs + output.prompt_logprobs
    num_alternatives = sum(len(entry.top) for entry in entries) if entries else 0
    return (
        _TOKEN_BYTES * len(output.token_ids)
        + _ENTRY_BYTES * len(entries)
        + _ALTERNATIVE_BYTES * num_alternatives
    )
