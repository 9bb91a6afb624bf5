"""Real servers for tests, which end with the test process even if that is killed."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from tessera.processes.child_process import start_child
from tessera.redis.binary import find_binary


@contextmanager
def run_server(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Valkey or Redis server in `folder`, without persistence unless the options ask for it.

    Yields at once: wait until it answers.
    """
    command = [str(find_binary()), "--dir", str(folder), "--save", "", "--loglevel", "warning", *options]
    with (folder / "server.log").open("wb") as output:
        server = start_child(command, output=output, lock_file=folder / "lock")
    try:
        yield server
    finally:
        server.kill()
        server.wait()


class CuttingProxy:
    """A unix socket in front of a server, which can swallow the reply to a command and hang up instead.

    What a client sees then is a connection that broke after the server had done the work.
    """

    def __init__(self, socket: Path, upstream: str) -> None:
        self.url = f"unix://{socket}"
        self._socket, self._upstream = socket, upstream.removeprefix("unix://")
        self._cut_after: bytes | None = None
        self.cuts = 0

    def cut_after(self, command: bytes) -> None:
        """Swallow the reply to the next command that contains these bytes."""
        self._cut_after = command

    @asynccontextmanager
    async def running(self) -> AsyncIterator[CuttingProxy]:
        server = await asyncio.start_unix_server(self._serve, path=self._socket)
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        try:
            while request := await reader.read(1 << 20):
                up_writer.write(request)
                reply = await up_reader.read(1 << 20)
                if self._cut_after is not None and self._cut_after in request:
                    self._cut_after = None
                    self.cuts += 1
                    return
                writer.write(reply)
        finally:
            for end in (writer, up_writer):
                end.close()
                with suppress(OSError):
                    await end.wait_closed()
