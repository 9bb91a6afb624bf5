"""Checking a file of examples in a process of its own.

To read JSON lines and to render templates is Python, and Python has one lock per process: a thread that reads
32 MB costs every other request some milliseconds at each of its steps. So each file is checked by a process
that lives for that file. It is forked from a twin of the API process, made before that had any threads, which
has the tokenizer loaded: a fork takes milliseconds and shares the twin's memory. It yields the processor to
the engine, and the kernel bounds its memory and its time.

    API process ── socket that carries a socket per file ──> twin ── fork per file ──> check, answer, exit
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from adapter_core.chat_format import ChatFormat
from adapter_core.child_process import end_with_parent
from adapter_core.errors import InvalidInput, InvalidTrainingData, LineError
from adapter_core.examples import for_each, parse_examples
from service.fair_gate import FairGate

#: Smaller files are checked in a thread: 10 ms.
MAX_INLINE_BYTES = 16 * 1024
#: Of the checking process. The slowest 32 MB that we know take 15 s and 0.5 GB.
MAX_CPU_S = 60
MAX_MEMORY_BYTES = 2 * 1024**3
_NICENESS = 10
_READ_BYTES = 1024 * 1024


class UploadCheck:
    """Counts the examples of files and finds what is wrong with them, two files at once, one of each tenant.

    twin: from `fork_twin`; None: files are checked in threads of this process.
    """

    def __init__(self, chat: ChatFormat, twin: Twin | None = None) -> None:
        self._chat = chat
        self._twin = twin
        self._gate = FairGate(capacity=2, share=1)

    async def count_examples(self, tenant: str, content: bytes, *, with_users: bool) -> int:
        """How many examples a JSONL file holds. Raises `InvalidTrainingData`, `InvalidInput`."""
        async with self._gate.room(tenant):
            found = await self._look(content, with_users)
        if "errors" in found:
            errors = [LineError(*error) for error in found["errors"]]
            raise InvalidTrainingData(errors, code=found["code"], num_problems=found["num_problems"])
        return int(found["num_examples"])

    async def _look(self, content: bytes, with_users: bool) -> dict[str, Any]:
        if self._twin is None or len(content) <= MAX_INLINE_BYTES:
            return await asyncio.to_thread(check, content, self._chat, with_users=with_users)
        own, others = socket.socketpair()
        own.setblocking(False)
        with others:
            socket.send_fds(self._twin.requests, [b"u" if with_users else b"-"], [others.fileno()])
        reader, writer = await asyncio.open_unix_connection(sock=own)
        try:
            writer.write(content)
            writer.write_eof()
            reply = await reader.read()
        except OSError:  # it was ended while it read
            reply = b""
        finally:
            writer.close()
        if not reply:
            raise InvalidInput(
                f"the file could not be checked within {MAX_CPU_S} s of processor time and "
                f"{MAX_MEMORY_BYTES >> 20} MiB; split it, or simplify its lines",
                param="file",
                code="file_too_complex",
            )
        found: dict[str, Any] = json.loads(reply)
        return found


def check(content: bytes, chat: ChatFormat, *, with_users: bool) -> dict[str, Any]:
    """What is to be said of a file: the number of its examples, or its errors."""
    try:
        examples = parse_examples(content, with_users=with_users)
        for_each(examples, chat.check)
    except InvalidTrainingData as error:
        errors = [(problem.line, problem.code, problem.message) for problem in error.errors]
        return {"errors": errors, "code": error.code, "num_problems": error.num_problems}
    return {"num_examples": len(examples)}


@dataclass(frozen=True)
class Twin:
    """The process that is forked for each file. It ends with this process, or with `close`."""

    process_id: int
    requests: socket.socket

    def close(self) -> None:
        """End the process, and with it the checks of files that are under way, and wait for it."""
        self.requests.close()
        os.kill(self.process_id, signal.SIGKILL)  # a later twin may hold a copy of the socket
        os.waitpid(self.process_id, 0)


def fork_twin(chat: ChatFormat, *, close_fds: Sequence[int] = ()) -> Twin:
    """Make the twin for `UploadCheck`. Call it before this process has any threads.

    close_fds: what the twin must not keep open.
    """
    own, others = socket.socketpair()
    process_id = os.fork()
    if process_id:
        others.close()
        return Twin(process_id, own)
    try:
        end_with_parent()
        own.close()
        for descriptor in close_fds:
            os.close(descriptor)
        _serve(others, chat)
    finally:
        os._exit(1)


def _serve(requests: socket.socket, chat: ChatFormat) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the service, which lets its requests finish
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that check
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    while True:
        kind, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not kind:
            os._exit(0)  # the API process is gone
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                try:
                    end_with_parent()
                    requests.close()
                    _answer(connection, chat, with_users=kind == b"u")
                finally:
                    os._exit(0)


def _answer(connection: socket.socket, chat: ChatFormat, *, with_users: bool) -> None:
    gc.disable()  # millions of small lists, all of which go with the process
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    limit = _data_bytes() + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    pieces = []
    while piece := connection.recv(_READ_BYTES):
        pieces.append(piece)
    connection.sendall(json.dumps(check(b"".join(pieces), chat, with_users=with_users)).encode())


def _data_bytes() -> int:
    """What RLIMIT_DATA counts, before the file is read; 0 where the kernel does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0
