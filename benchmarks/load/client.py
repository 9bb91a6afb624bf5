"""One streamed completion over HTTP, timed. A client of its own, because a library's costs would be measured
with the server's: about 0.1 ms a request and 10 µs a token."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

LIMIT_BYTES = 16 * 1024 * 1024


@dataclass
class Outcome:
    """What became of one request. started_at: when it was due. token_times: when each piece with text came.

    error: None, an error's code, "http_<status>", "timeout" or "connection". num_tokens: by the server's own
    count.
    """

    started_at: float
    token_times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None
    is_cancelled: bool = False

    @property
    def first_token_s(self) -> float | None:
        return self.token_times[0] - self.started_at if self.token_times else None

    @property
    def per_token_s(self) -> float | None:
        """Mean time between tokens after the first."""
        if self.num_tokens < 2 or len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_tokens - 1)


@dataclass(frozen=True)
class Prompt:
    """A request of exactly max_tokens tokens. cancel_after: hang up after so many pieces. key: of the API."""

    model: str
    token_ids: Sequence[int]
    max_tokens: int
    cancel_after: int | None = None
    key: str | None = None

    def body(self) -> bytes:
        return json.dumps(
            {
                "model": self.model,
                "prompt": list(self.token_ids),
                "max_tokens": self.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()


async def complete(port: int, prompt: Prompt, *, timeout_s: float, due_at: float | None = None) -> Outcome:
    """Send `prompt` to a service on loopback and read its answer to the end. Never raises."""
    outcome = Outcome(time.monotonic() if due_at is None else due_at)
    try:
        async with asyncio.timeout(timeout_s):
            await _exchange(port, prompt, outcome)
    except TimeoutError:
        outcome.error = "timeout"
    except (OSError, asyncio.IncompleteReadError, ValueError):
        outcome.error = "connection"
    return outcome


async def _exchange(port: int, prompt: Prompt, outcome: Outcome) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LIMIT_BYTES)
    try:
        body = prompt.body()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
            + ("" if prompt.key is None else f"authorization: Bearer {prompt.key}\r\n")
            + f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if status != 200:
            outcome.error = _error_code(await reader.read(LIMIT_BYTES), status)
            return
        async for event in _events(reader):
            _note(event, outcome)
            if prompt.cancel_after is not None and len(outcome.token_times) >= prompt.cancel_after:
                outcome.is_cancelled = True
                return
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event of a chunked body, up to [DONE]."""
    text = b""
    while size := int((await reader.readline()).strip() or b"0", 16):
        text += (await reader.readexactly(size + 2))[:-2]
        *events, text = text.split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                return
            if event.startswith(b"data: "):  # and not a comment
                yield json.loads(event[6:])


def _note(event: dict[str, Any], outcome: Outcome) -> None:
    if "error" in event:
        outcome.error = event["error"]["code"]
    elif event.get("usage"):
        outcome.num_tokens = event["usage"]["completion_tokens"]
    elif event["choices"]:
        outcome.token_times.append(time.monotonic())


def _error_code(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"http_{status}"
