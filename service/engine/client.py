"""What the API knows of the engine: one object that generates, and keeps an engine process alive behind it.

The process is started, watched and started again when it dies, hangs or speaks nonsense. Its death costs the
requests in flight (`EngineUnavailable`), never the API. Knows nothing of HTTP, text or the store's content.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from adapter_core.errors import EngineUnavailable, InvalidInput
from adapter_core.settings import CommonSettings
from service.engine import ipc
from service.engine.messages import EngineInfo, EngineStats, GenerationRequest, TokenOutput
from service.engine.output_stream import OutputStream
from service.engine.settings import EngineSettings
from service.engine.supervisor import (
    COMMAND,
    EngineChild,
    Heartbeat,
    RestartDelay,
    child_environment,
    socket_path,
)

logger = logging.getLogger(__name__)

#: Silence allowed before the engine is ready: importing torch on a busy machine takes tens of seconds. It
#: speaks once a second from then on, also while it loads a model or waits for the store.
START_TIMEOUT_S = 180.0
CONNECT_POLL_S = 0.05
UNLOAD_TIMEOUT_S = 10.0

#: What callers are told. The reasons name paths and addresses: they are for `starting_error` and the log.
NOT_READY = "the engine is starting; try again later"
DIED = "the engine ended while it worked on this request; it is being started again"


class EngineClient:
    """The engine, for the routes. `start` and `close` frame its life, in one event loop.

    stats: the latest figures, None while no engine runs. starting_error: why the engine is not ready, in
    words; None when it is. restarts_total: processes started after the first. command: what is started.
    """

    def __init__(
        self,
        settings: CommonSettings,
        store_url: str,
        *,
        engine_settings: EngineSettings | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.stats: EngineStats | None = None
        self.starting_error: str | None = "the engine has not been started"
        self.restarts_total = 0
        self._data_dir = settings.data_dir
        self._engine_settings = engine_settings or EngineSettings()
        self._command = command
        self._environment = child_environment(settings, self._engine_settings, store_url)
        self._info: EngineInfo | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._streams: dict[str, OutputStream] = {}
        self._unloads: dict[int, asyncio.Future[None]] = {}
        self._unload_numbers = itertools.count()
        self._heartbeat = Heartbeat(START_TIMEOUT_S)
        self._restart_delay = RestartDelay()
        self._ready = asyncio.Event()
        self._supervision: asyncio.Task[None] | None = None
        self._failure: str | None = None  # why the process said that it would end

    @property
    def is_ready(self) -> bool:
        return self._info is not None

    @property
    def info(self) -> EngineInfo:
        """What the engine is. Raises `EngineUnavailable` until it is ready."""
        if self._info is None:
            raise EngineUnavailable(NOT_READY)
        return self._info

    async def start(self) -> None:
        """Begin to keep an engine process alive. Returns at once; see `wait_ready`."""
        assert self._supervision is None, "started twice"
        self.starting_error = "the engine process is being started"
        self._supervision = asyncio.create_task(self._supervise())

    async def wait_ready(self, timeout_s: float) -> EngineInfo:
        """Wait until the engine serves. Raises `EngineUnavailable` with the reason after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError as error:
            raise EngineUnavailable(f"not ready within {timeout_s:g} s: {self.starting_error}") from error
        return self.info

    async def close(self) -> None:
        """End the engine process; requests in flight raise `EngineUnavailable`. Leaves no process behind."""
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
            self._supervision = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Continue one sequence; the last output has a finish_reason. Closing the iterator cancels it.

        Outputs that a slow reader did not take in time arrive as one. Raises `EngineUnavailable` if there is
        no engine or it dies, and what the engine refuses a request with: `InvalidInput`, `EngineOverloaded`.
        """
        _ = self.info
        assert request.request_id not in self._streams, "request ids are unique"
        stream = self._streams[request.request_id] = OutputStream()
        try:
            await self._submit(request)
            while not (output := await stream.next()).finish_reason:
                yield output
            yield output
        finally:
            del self._streams[request.request_id]
            if not stream.is_finished:
                self._send(ipc.encode("cancel", request_id=request.request_id))

    async def unload(self, tenant: str, adapter_id: str) -> None:
        """Drop an adapter's copies in the engine; those in use go when their requests end.

        Raises `EngineUnavailable` if the engine does not confirm in time. An engine that is not running, or
        dies meanwhile, holds no copies.
        """
        if not self.is_ready:
            return
        number = next(self._unload_numbers)
        done = self._unloads[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(ipc.encode("unload", id=number, tenant=tenant, adapter_id=adapter_id))
            async with asyncio.timeout(UNLOAD_TIMEOUT_S):
                await done
        except TimeoutError as error:
            raise EngineUnavailable(f"the engine did not confirm within {UNLOAD_TIMEOUT_S:g} s") from error
        finally:
            del self._unloads[number]

    async def _submit(self, request: GenerationRequest) -> None:
        try:
            frame = ipc.encode("submit", request=ipc.request_map(request))
        except ipc.FrameError as error:
            raise InvalidInput(f"the request cannot be sent to the engine: {error}") from error
        self._send(frame)
        writer = self._writer
        if writer is not None:
            with contextlib.suppress(ConnectionError):  # then `_disconnect` tells the stream
                await writer.drain()

    def _send(self, frame: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame)

    async def _supervise(self) -> None:
        while True:
            reason = await self._run_child()
            delay_s = self._restart_delay.next_s()
            logger.error("%s; the next engine process starts in %.1f s", reason, delay_s)
            await asyncio.sleep(delay_s)
            self.restarts_total += 1

    async def _run_child(self) -> str:
        """Start one engine process and attend to it until it is gone; returns why it is."""
        try:
            child = EngineChild(self._command, self._environment, socket_path(self._data_dir))
            child.start()
        except (OSError, EngineUnavailable) as error:
            self.starting_error = f"the engine process cannot be started: {error}"
            return self.starting_error
        logger.info("engine process %d started", child.pid)
        reason, kill = "the engine is being closed", False
        try:
            reason, kill = await self._attend(child)
        except (ipc.FrameError, EngineUnavailable) as error:
            reason, kill = str(error), True
        except Exception as error:  # whatever it is, it must not end the supervision
            logger.exception("attending to engine process %d failed", child.pid)
            reason, kill = f"attending to the engine process failed: {error!r}", True
        finally:
            self._disconnect(reason)
            await child.end(kill=kill)
        return reason

    async def _attend(self, child: EngineChild) -> tuple[str, bool]:
        """Talk to the process until it ends or has to be ended: why, and whether it must be killed."""
        self._failure = None
        self._heartbeat.timeout_s = START_TIMEOUT_S
        exited = asyncio.create_task(child.exited())
        silent = asyncio.create_task(self._heartbeat.missed())
        talk = asyncio.create_task(self._talk(child))
        tasks = (exited, silent, talk)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not exited.cancelled():
            ending = f"the engine process ended with status {exited.result()}"
            return f"{ending}: {self._failure}" if self._failure else ending, False
        if not talk.cancelled():
            talk.result()  # raises: the process speaks nonsense or is stuck
        return f"the engine process has been silent for {self._heartbeat.timeout_s:g} s", True

    async def _talk(self, child: EngineChild) -> None:
        """Connect and read, again if the connection is cut, for as long as the process lives."""
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(child.socket)
                while (message := await ipc.read_frame(reader)) is not None:
                    self._heartbeat.beat()
                    self._on_message(message)
            except (FileNotFoundError, ConnectionError):
                pass  # not there yet, or its end: then `_attend` is about to stop this
            if self._writer is not None:
                self._disconnect(self._failure or "the engine closed the connection")
            await asyncio.sleep(CONNECT_POLL_S)

    def _on_message(self, message: dict[str, Any]) -> None:
        """Act on one message. Raises `ipc.FrameError`, and `EngineUnavailable` if the engine is stuck."""
        try:
            match message["type"]:
                case "outputs":
                    for row in message["outputs"]:
                        self._on_output(ipc.output_from_row(row))
                case "stats":
                    self._on_stats(EngineStats.from_map(message["stats"]), message["stalled_s"])
                case "refused":
                    if (stream := self._streams.get(message["request_id"])) is not None:
                        stream.fail(ipc.error_from_map(message["error"]))
                case "unloaded":
                    if (done := self._unloads.get(message["id"])) is not None and not done.done():
                        done.set_result(None)
                case "ready":
                    self._on_ready(EngineInfo.from_map(message["info"]))
                case "starting":
                    self.starting_error = message["reason"]
                case "failed":
                    self._failure = ipc.error_from_map(message["error"]).message
        except (KeyError, TypeError, ValueError) as error:
            raise ipc.FrameError(f"a {message['type']} message that cannot be read: {error!r}") from error

    def _on_output(self, output: TokenOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is not None:
            stream.put(output)

    def _on_stats(self, stats: EngineStats, stalled_s: float) -> None:
        self.stats = stats
        if stalled_s > self._engine_settings.heartbeat_timeout_s:
            raise EngineUnavailable(f"the engine has not come to the end of a step for {stalled_s:.0f} s")

    def _on_ready(self, info: EngineInfo) -> None:
        self._info = info
        self.starting_error = None
        self._heartbeat.timeout_s = self._engine_settings.heartbeat_timeout_s
        self._restart_delay.note_ready()
        self._ready.set()

    def _disconnect(self, reason: str) -> None:
        """The engine is out of reach: so say all who wait for it."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._writer = self._info = self.stats = None
        self._ready.clear()
        self.starting_error = reason
        for stream in self._streams.values():
            stream.fail(EngineUnavailable(DIED))
        for done in self._unloads.values():
            if not done.done():
                done.set_result(None)
