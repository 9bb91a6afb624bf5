"""The engine's side of the socket: several API connections share one engine thread.

Every connection is greeted with the state (starting or ready), and may submit, cancel, unload, check and
ping. It gets everything that one step produced for it in one frame. A connection that breaks the protocol is
cut, and no other is affected; when a connection ends, its requests are cancelled. Knows nothing of Redis or
of how the engine starts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.engine.engine import Engine
from service.engine.process.adapter_fetcher import AdapterFetcher
from service.engine.process.engine_thread import STATS_INTERVAL_S, Command, Delivery, EngineThread
from service.engine.wire import ipc
from service.engine.wire.messages import EngineInfo, EngineStats, GenerationRequest, TokenOutput
from tessera.errors import EngineUnavailable, RequestFailed, TesseraError

logger = logging.getLogger(__name__)

#: Bytes that may wait for a connection that does not read. Above it the connection is cut: the engine's
#: memory is not the place to keep what a stopped API process does not read.
MAX_BACKLOG_BYTES = 2 * ipc.MAX_FRAME_BYTES
_FLUSH_POLL_S = 0.02


class _Connection:
    """The connection of one API process."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.number = number
        #: Its requests in flight, by the ids that the engine knows them by.
        self.requests: set[str] = set()
        self._writer = writer

    def send(self, frame: bytes) -> None:
        """Queue one frame. Does nothing if the connection is closing."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() + len(frame) > MAX_BACKLOG_BYTES:
            logger.error("connection %d does not read its frames and is cut", self.number)
            self.abort()
            return
        self._writer.write(frame)

    @property
    def has_backlog(self) -> bool:
        return not self._writer.is_closing() and self._writer.transport.get_write_buffer_size() > 0

    def abort(self) -> None:
        self._writer.transport.abort()


class EngineServer:
    """Passes messages between the connections and the engine thread. Lives in the asyncio loop."""

    def __init__(self) -> None:
        self._connections: dict[int, _Connection] = {}
        self._num_accepted = 0
        self._thread: EngineThread | None = None
        self._fetcher: AdapterFetcher | None = None
        self._greeting = ipc.encode("starting", reason="the engine process has started")
        self._stats = EngineStats()
        self._stats_sent_at = 0.0
        self._server: asyncio.Server | None = None

    async def listen(self, path: Path) -> None:
        """Accept connections at a unix socket, which replaces a stale one. Its folder must be open to this
        user only."""
        self._server = await asyncio.start_unix_server(self._serve, path)
        os.chmod(path, 0o600)

    def announce_starting(self, reason: str) -> None:
        logger.info("%s", reason)  # it may take minutes, in which nothing else is logged
        self._greet(ipc.encode("starting", reason=reason))

    def announce_failure(self, error: TesseraError) -> None:
        """Announce that the engine cannot start, or cannot continue, and that the process is about to end."""
        self._greet(ipc.encode("failed", error=ipc.error_map(error)))

    def announce_ready(self, info: EngineInfo, thread: EngineThread, fetcher: AdapterFetcher) -> None:
        """Announce that the engine is ready: from now on requests go to `thread`, which calls `deliver`, and
        `fetcher` fetches what they need."""
        self._thread = thread
        self._fetcher = fetcher
        self._greet(ipc.encode("ready", info=vars(info)))

    async def keep_beating(self) -> None:
        """Send the state or the statistics to every connection once a second, forever."""
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            if self._thread is None:
                self._broadcast(self._greeting)
                continue
            self._thread.check_progress()
            if time.monotonic() - self._stats_sent_at >= 0.9 * STATS_INTERVAL_S:
                self._send_stats()

    def deliver(self, delivery: Delivery) -> None:
        """Send what the engine produced, in one frame per connection, and fetch what it lacks."""
        for reply, error in delivery.replies:
            reply(error)
        rows: defaultdict[int, list[tuple[Any, ...]]] = defaultdict(list)
        for output in delivery.outputs:
            prefix, _, request_id = output.request_id.partition("/")
            number = int(prefix)
            connection = self._connections.get(number)
            if connection is None:
                continue
            rows[number].append(ipc.output_row(output, request_id=request_id))
            if output.finish_reason is not None:
                connection.requests.discard(output.request_id)
        for number, own_rows in rows.items():
            for frame in _encode_outputs(own_rows):
                self._connections[number].send(frame)
        if delivery.stats is not None:
            self._stats = delivery.stats
            self._send_stats()
        if self._fetcher is not None and (delivery.missing_adapters or delivery.missing_bases):
            self._fetcher.fetch(delivery.missing_adapters)
            for basis_id in delivery.missing_bases:
                self._fetcher.fetch_basis(basis_id)

    async def close(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections.values()):
            connection.abort()

    async def flush(self, *, timeout_s: float) -> None:
        """Give a client time to connect and learn why the process ends, and let sent frames leave."""
        give_up_at = time.monotonic() + timeout_s
        while self._num_accepted == 0 or any(c.has_backlog for c in self._connections.values()):
            if time.monotonic() > give_up_at:
                return
            await asyncio.sleep(_FLUSH_POLL_S)

    def _greet(self, frame: bytes) -> None:
        self._greeting = frame
        self._broadcast(frame)

    def _broadcast(self, frame: bytes) -> None:
        for connection in self._connections.values():
            connection.send(frame)

    def _send_stats(self) -> None:
        stalled_s = self._thread.stalled_s if self._thread else 0.0
        self._broadcast(ipc.encode("stats", stats=vars(self._stats), stalled_s=stalled_s))
        self._stats_sent_at = time.monotonic()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_accepted += 1
        connection = _Connection(self._num_accepted, writer)
        self._connections[connection.number] = connection
        connection.send(self._greeting)
        try:
            while (message := await ipc.read_frame(reader)) is not None:
                self._handle(connection, message)
        except ipc.FrameError as error:
            logger.warning("connection %d: %s; it is closed", connection.number, error)
        except OSError as error:
            logger.info("connection %d is lost: %s", connection.number, error)
        finally:
            self._forget(connection)
            connection.abort()

    def _handle(self, connection: _Connection, message: dict[str, Any]) -> None:
        """Act on one message. Raises `ipc.FrameError` if it is not part of the protocol."""
        try:
            match message["type"]:
                case "submit":
                    self._submit(connection, ipc.request_from_map(message["request"]))
                case "cancel":
                    self._cancel(f"{connection.number}/{message['request_id']}")
                case "unload":
                    tenant, adapter_id = message["tenant"], message["adapter_id"]
                    self._call(connection, message["id"], lambda engine: engine.unload(tenant, adapter_id))
                case "check":
                    self._call(connection, message["id"], _check_integrity)
                case "ping":
                    connection.send(ipc.encode("pong"))
                case _:
                    raise ValueError("unknown type")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ipc.FrameError(f"unreadable {message['type']!r} message: {error!r}") from error

    def _submit(self, connection: _Connection, request: GenerationRequest) -> None:
        def reply(error: TesseraError | None) -> None:
            if error is not None:
                connection.requests.discard(engine_id)
                connection.send(
                    ipc.encode("refused", request_id=request.request_id, error=ipc.error_map(error))
                )

        # Two API processes may use the same id, so inside the engine it carries the connection's number.
        engine_id = f"{connection.number}/{request.request_id}"
        if engine_id in connection.requests:
            raise ValueError(f"request {request.request_id} is already in flight")
        if self._thread is None:
            reply(EngineUnavailable("the engine is starting"))
            return
        connection.requests.add(engine_id)
        engine_request = dataclasses.replace(request, request_id=engine_id)
        self._thread.post(lambda engine: engine.submit(engine_request), reply)
        if request.adapter is not None and self._fetcher is not None:
            self._fetcher.fetch_ahead(request.adapter)

    def _cancel(self, engine_id: str) -> None:
        if self._thread is not None:
            self._thread.post(lambda engine: engine.cancel(engine_id))

    def _call(self, connection: _Connection, number: int, command: Command) -> None:
        """Run `command` between two steps, and send the sender a "done" message afterwards."""

        def reply(error: TesseraError | None) -> None:
            connection.send(ipc.encode("done", id=number, error=error and ipc.error_map(error)))

        if self._thread is None:
            reply(None)
        else:
            self._thread.post(command, reply)

    def _forget(self, connection: _Connection) -> None:
        self._connections.pop(connection.number, None)
        for engine_id in connection.requests:
            self._cancel(engine_id)


def _check_integrity(engine: Engine) -> None:
    """Check the engine's bookkeeping. Raises `RequestFailed` if it is wrong; the engine continues to run."""
    try:
        engine.check_integrity()
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{where.name}, line {where.lineno}: {where.line} {error}"
        raise RequestFailed(message, code="integrity_violated") from error


def _encode_outputs(rows: list[tuple[Any, ...]]) -> Iterator[bytes]:
    """Encode `rows` in as few frames as the size limit allows. A single output above it becomes an error."""
    try:
        yield ipc.encode("outputs", outputs=rows)
    except ipc.FrameError:
        if len(rows) > 1:
            yield from _encode_outputs(rows[: len(rows) // 2])
            yield from _encode_outputs(rows[len(rows) // 2 :])
            return
        error = (
            "output_too_large",
            "the output exceeds the size of one message; request fewer log-probabilities",
        )
        output = TokenOutput(rows[0][0], finish_reason="error", error=error)
        yield ipc.encode("outputs", outputs=[ipc.output_row(output, request_id=output.request_id)])
