"""Process large inputs in processes of their own, forked from a twin of the API process.

Reading JSON and rendering templates runs in Python, which has one lock per process: a thread that does it
delays every other request by some milliseconds at each of its steps. So each large input gets a process that
lives for that input. It is forked from a twin of the API process, which was made before the API process had
any threads and has the tokenizer loaded. A fork takes 5 ms, none of which falls on the API process, and
shares the twin's memory. Twin and forks yield the processor to the API process and the engine, and the kernel
limits the memory and time of each.

    API process ── socket that carries a socket per input ──> twin ── fork per input ──> work, reply, exit

Does not know what the work is.
"""

from __future__ import annotations

import asyncio
import gc
import io
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from tessera.processes.child_process import end_with_parent


@dataclass(frozen=True)
class Limits:
    """The time and memory that a forked process may use before the kernel ends it."""

    max_cpu_s: int
    max_memory_bytes: int

    def __str__(self) -> str:
        return f"{self.max_cpu_s} s of processor time and {self.max_memory_bytes >> 20} MiB"


#: The limits of work for which `fork_twin` is given no others. The slowest upload that we know, of 32 MB,
#: takes 15 s and 0.5 GB.
DEFAULT_LIMITS = Limits(max_cpu_s=60, max_memory_bytes=2 * 1024**3)
#: A task that wakes up gets the processor at once from processes of this niceness, as if they were not there
#: (with two of them on one processor: a median of 0.0 ms, and of 3.2 ms at niceness 0). SCHED_IDLE is no
#: better, and such a process would get no time at all while the engine computes.
NICENESS = 10
#: Bytes that are sent or received at a time: 0.1 ms.
_PIECE_BYTES = 128 * 1024
#: A reply begins with its size, a number of this many bytes.
_SIZE_BYTES = 8

#: A function from an input to its reply, which is never empty.
Work = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Twin:
    """The process that forks for each large input. It ends with this process, or with `close`."""

    process_id: int
    requests: socket.socket

    async def work(self, name: bytes, content: bytes | BinaryIO) -> memoryview:
        """Return the reply of the work called `name` to `content`; empty if the work exceeded its limits."""
        loop = asyncio.get_running_loop()
        own, others = socket.socketpair()
        with own:
            own.setblocking(False)
            with others:
                socket.send_fds(self.requests, [name], [others.fileno()])
            try:
                # Piece by piece, because a transport copies what it cannot send at once.
                for piece in _pieces_of(content):
                    await loop.sock_sendall(own, piece)
                own.shutdown(socket.SHUT_WR)
                return await _receive(own)
            except OSError:  # the fork was ended while it read
                return memoryview(b"")

    def close(self) -> None:
        """End the process and the work under way, and wait for it."""
        self.requests.close()
        os.kill(self.process_id, signal.SIGKILL)  # a later twin may hold a copy of the socket
        os.waitpid(self.process_id, 0)


def fork_twin(
    works: Mapping[bytes, Work],
    *,
    limits: Mapping[bytes, Limits] | None = None,
    close_fds: Sequence[int] = (),
) -> Twin:
    """Make the twin. Call it before this process has any threads.

    works: name of one byte -> work. limits: limits of the works that need others than DEFAULT_LIMITS.
    close_fds: file descriptors that the twin must not keep open.
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
        _serve(others, works, limits or {})
    finally:
        os._exit(1)


def size_of(content: bytes | BinaryIO) -> int:
    """Return the number of bytes; a file is read from its beginning afterwards."""
    if isinstance(content, bytes):
        return len(content)
    size = content.seek(0, io.SEEK_END)
    content.seek(0)
    return size


def _pieces_of(content: bytes | BinaryIO) -> Iterator[memoryview]:
    if isinstance(content, bytes):
        whole = memoryview(content)
        for start in range(0, len(whole), _PIECE_BYTES):
            yield whole[start : start + _PIECE_BYTES]
        return
    content.seek(0)
    while piece := content.read(_PIECE_BYTES):
        yield memoryview(piece)


async def _receive(connection: socket.socket) -> memoryview:
    """Receive one reply; empty if it breaks off. Its size comes first, so that no pieces have to be
    joined."""
    loop = asyncio.get_running_loop()
    head = await loop.sock_recv(connection, _SIZE_BYTES)  # it is so small that it arrives whole
    answer = memoryview(bytearray(int.from_bytes(head)))
    rest = answer
    while rest:
        num_bytes = await loop.sock_recv_into(connection, rest[:_PIECE_BYTES])
        if not num_bytes:
            return memoryview(b"")
        rest = rest[num_bytes:]
    return answer


def _serve(requests: socket.socket, works: Mapping[bytes, Work], limits: Mapping[bytes, Limits]) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the service, which lets its requests finish
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forks are not waited for
    os.nice(NICENESS)
    gc.disable()  # a fork may make millions of small lists, and frees them all by ending
    while True:
        name, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not name:
            os._exit(0)  # the API process is gone
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                try:
                    end_with_parent()
                    requests.close()
                    _answer(connection, works[name], limits.get(name, DEFAULT_LIMITS))
                finally:
                    os._exit(0)


def _answer(connection: socket.socket, work: Work, limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limits.max_cpu_s, limits.max_cpu_s))
    limit = _data_bytes() + limits.max_memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    content = io.BytesIO()
    while piece := connection.recv(_PIECE_BYTES):
        content.write(piece)
    answer = work(content.getvalue())
    connection.sendall(len(answer).to_bytes(_SIZE_BYTES))
    connection.sendall(answer)


def _data_bytes() -> int:
    """Return the memory that RLIMIT_DATA counts before the input is read; 0 if the kernel does not report
    it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0
