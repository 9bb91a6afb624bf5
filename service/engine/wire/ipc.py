"""Frames between the API and the engine process: how they are delimited, packed and read.

    frame = length, 4 bytes big-endian | one msgpack map with a "type"

    API → engine    submit   request
                    cancel   request_id
                    unload   id, tenant, adapter_id
                    check    id                              check the engine's books, between two steps
                    ping                                     ask for a sign of life
    engine → API    starting reason                          once a second until ready
                    failed   error                           it cannot start or continue, and exits
                    ready    info                            when it is ready, and to each later connection
                    stats    stats, stalled_s                once a second, and when the work is done
                    outputs  outputs                         all that one step produced for this connection
                    refused  request_id, error               the request was refused
                    done     id, error                       answers an unload or a check
                    pong                                     at once, whatever the engine does

Outputs travel as rows without field names: at 256 sequences and 100 steps a second `dataclasses.asdict` alone
would take half a core. Knows nothing of sockets, processes or queues. Uses no pickle.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from typing import Any

import msgpack

from service.engine.wire.messages import (
    Classification,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from tessera.errors import (
    AdapterReplaced,
    BasisMismatch,
    Conflict,
    CorruptRecord,
    EngineOverloaded,
    EngineUnavailable,
    InvalidInput,
    NotFound,
    RequestFailed,
    StoreFull,
    StoreUnavailable,
    TenantOverloaded,
    TesseraError,
    Unavailable,
    UnsupportedModel,
)
from tessera.formats.adapter_ref import AdapterRef

#: The largest frame. A prompt of 128k tokens is 0.6 MB, and its log-probabilities with 20 alternatives each
#: are 40 MB. A peer that announces more is broken, and must not make the reader reserve memory.
MAX_FRAME_BYTES = 64 * 1024 * 1024

_LENGTH = struct.Struct(">I")

#: The errors that keep their class on the way to the API. Any other arrives as `RequestFailed`.
_ERRORS: dict[str, type[TesseraError]] = {
    cls.__name__: cls
    for cls in (
        AdapterReplaced,
        BasisMismatch,
        Conflict,
        CorruptRecord,
        EngineOverloaded,
        EngineUnavailable,
        InvalidInput,
        NotFound,
        RequestFailed,
        StoreFull,
        StoreUnavailable,
        TenantOverloaded,
        Unavailable,
        UnsupportedModel,
    )
}


class FrameError(ValueError):
    """Bytes that are no frame, or a message that makes none. The connection cannot be used any more."""


def encode(kind: str, **fields: Any) -> bytes:
    """Return one frame. Raises `FrameError` for values that msgpack does not know, and above
    MAX_FRAME_BYTES."""
    try:
        body: bytes = msgpack.packb({"type": kind, **fields}, unicode_errors="backslashreplace")
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameError(f"cannot pack a {kind} message: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a {kind} message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Return the next message, or None if the stream ends between two frames. Raises `FrameError`."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
        body = await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        if error.partial or error.expected != _LENGTH.size:
            raise FrameError("the stream ended inside a frame") from error
        return None
    return decode(body)


def decode(body: bytes) -> dict[str, Any]:
    """Return the message in a frame's body. Raises `FrameError` unless it is a map with a string "type"."""
    try:
        message = msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise FrameError(f"a frame that is not msgpack: {error}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise FrameError("a frame that is not a map with a type")
    return message


def request_map(request: GenerationRequest) -> dict[str, Any]:
    """Return a request for the wire, which shares its token list instead of copying it."""
    adapter = request.adapter
    values = {
        **vars(request),
        "sampling": vars(request.sampling),
        "adapter": vars(adapter) if adapter else None,
    }
    values["deadline_s"] = values.pop("timeout_s")
    return values


def request_from_map(values: dict[str, Any]) -> GenerationRequest:
    """Invert `request_map`. Raises TypeError or KeyError for unknown or missing fields."""
    sampling, adapter = values["sampling"], values["adapter"]
    known = {
        "sampling": SamplingParams(**{**sampling, "stop_token_ids": tuple(sampling["stop_token_ids"])}),
        "adapter": AdapterRef(**adapter) if adapter else None,
        "timeout_s": values["deadline_s"],
    }
    others = {name: value for name, value in values.items() if name != "deadline_s"}
    return GenerationRequest(**{**others, **known})


def output_row(output: TokenOutput, *, request_id: str) -> tuple[Any, ...]:
    """Return an output without field names. request_id: the id by which the receiver knows the request."""
    prompt = output.prompt_logprobs
    return (
        request_id,
        output.token_ids,
        [_logprobs_row(entry) for entry in output.logprobs],
        None if prompt is None else [_logprobs_row(entry) for entry in prompt],
        output.finish_reason,
        output.error,
        output.num_cached_tokens,
        output.num_distinct,
        None if output.classification is None else list(vars(output.classification).values()),
    )


def output_from_row(row: Sequence[Any]) -> TokenOutput:
    """Invert `output_row`. Raises `FrameError`."""
    try:
        (request_id, token_ids, logprobs, prompt, finish_reason, error, num_cached, num_distinct,
         classification) = row  # fmt: skip
        return TokenOutput(
            request_id,
            token_ids,
            [_logprobs_from_row(entry) for entry in logprobs],
            None if prompt is None else [_logprobs_from_row(entry) for entry in prompt],
            finish_reason,
            None if error is None else (error[0], error[1]),
            num_cached,
            num_distinct,
            None if classification is None else Classification(*classification),
        )
    except (TypeError, ValueError, IndexError) as error:
        raise FrameError(f"unreadable output: {error}") from error


def _logprobs_row(entry: TokenLogprobs) -> tuple[Any, ...]:
    return (entry.token_id, entry.logprob, entry.top)


def _logprobs_from_row(row: Sequence[Any]) -> TokenLogprobs:
    token_id, logprob, top = row
    return TokenLogprobs(token_id, logprob, [(token, value) for token, value in top])


def error_map(error: TesseraError) -> dict[str, Any]:
    """Return an error for the wire: the nearest class that the reader knows, code, message and parameter."""
    known = (cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _ERRORS)
    return {
        "class": next(known, RequestFailed.__name__),
        "code": error.code,
        "message": error.message,
        "param": error.param,
    }


def error_from_map(values: dict[str, Any]) -> TesseraError:
    """Invert `error_map`. Raises `FrameError`."""
    try:
        cls = _ERRORS.get(values["class"], RequestFailed)
        return cls(str(values["message"]), param=values["param"], code=str(values["code"]))
    except (KeyError, TypeError) as error:
        raise FrameError(f"unreadable error: {error}") from error
