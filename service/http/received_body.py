"""The body of a request that has arrived whole: in memory, or a large upload in a temporary file.

Knows no limits and no routes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from tempfile import SpooledTemporaryFile

from starlette.types import Message

#: Bytes of a spooled body that stay in memory.
SPOOL_BYTES = 1024 * 1024
#: Bytes that are read back from the file at a time.
_PIECE_BYTES = 64 * 1024


class ReceivedBody:
    """The messages of a body, to be replayed in order."""

    def __init__(self, *, is_spooled: bool) -> None:
        """is_spooled: keep at most SPOOL_BYTES in memory, and the rest in a temporary file."""
        self._messages: deque[Message] = deque()
        self._file: SpooledTemporaryFile[bytes] | None = None
        if is_spooled:
            self._file = SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - closed by `close`

    def add(self, message: Message) -> None:
        """Take the next message."""
        if self._file is None or message["type"] != "http.request":
            self._messages.append(message)
        else:
            self._file.write(message.get("body", b""))

    def rewind(self) -> None:
        """Begin the replay. All messages have arrived."""
        if self._file is not None:
            self._file.seek(0)

    async def next(self) -> Message | None:
        """Return the next message of the replay; None after the last one."""
        piece = b"" if self._file is None else self._file.read(_PIECE_BYTES)
        if self._file is not None:
            await asyncio.sleep(0)  # give other tasks a turn between two pieces
            if len(piece) < _PIECE_BYTES:
                self._file.close()
                self._file = None
            has_more = self._file is not None or bool(self._messages)
            return {"type": "http.request", "body": piece, "more_body": has_more}
        if not self._messages:
            return None
        if len(self._messages) > 1:
            await asyncio.sleep(0)  # 4 MB are read in 64 pieces
        return self._messages.popleft()

    def close(self) -> None:
        """Give back what the body takes. The replay ends."""
        self._messages.clear()
        if self._file is not None:
            self._file.close()
        self._file = None
