"""Frames: messages arrive as they were sent, and nothing else is accepted as a frame."""

from __future__ import annotations

import asyncio
import math
import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.client.connection import OutputStream, merge_outputs
from service.engine.wire import ipc
from service.engine.wire.messages import GenerationRequest, SamplingParams, TokenLogprobs, TokenOutput
from tessera.errors import (
    AdapterDeleted,
    Conflict,
    EngineOverloaded,
    InvalidInput,
    NotFound,
    RequestFailed,
    StoreFull,
    TesseraError,
)
from tessera.formats.adapter_ref import AdapterRef


def stream_of(data: bytes) -> asyncio.StreamReader:
    """A stream that ends after `data`."""
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


async def read_all(data: bytes) -> list[dict[str, object]]:
    reader, messages = stream_of(data), []
    while (message := await ipc.read_frame(reader)) is not None:
        messages.append(message)
    return messages


def body_of(frame: bytes) -> bytes:
    return frame[4:]


async def test_frames_arrive_one_by_one_and_in_order() -> None:
    messages = await read_all(ipc.encode("cancel", request_id="a") + ipc.encode("unload", id=1))

    assert messages == [{"type": "cancel", "request_id": "a"}, {"type": "unload", "id": 1}]


async def test_a_frame_that_arrives_byte_by_byte_is_read_whole() -> None:
    frame = ipc.encode("stats", stats={"steps_total": 7}, stalled_s=0.5)
    reader = asyncio.StreamReader()
    reading = asyncio.create_task(ipc.read_frame(reader))

    for value in frame:
        reader.feed_data(bytes([value]))
        await asyncio.sleep(0)

    assert await reading == {"type": "stats", "stats": {"steps_total": 7}, "stalled_s": 0.5}


@pytest.mark.parametrize("cut", [1, 3, 4, 10])
async def test_a_stream_that_ends_inside_a_frame_is_an_error(cut: int) -> None:
    frame = ipc.encode("cancel", request_id="a long enough id")

    with pytest.raises(ipc.FrameError, match="inside a frame"):
        await read_all(frame[:cut])


async def test_a_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack(">I", ipc.MAX_FRAME_BYTES + 1))

    with pytest.raises(ipc.FrameError, match="exceeds"):
        await ipc.read_frame(reader)


def test_a_message_over_the_limit_is_not_sent() -> None:
    with pytest.raises(ipc.FrameError, match="exceeds"):
        ipc.encode("submit", blob=bytes(ipc.MAX_FRAME_BYTES))


@pytest.mark.parametrize("value", [object(), 2**64, {1, 2}], ids=["object", "big integer", "set"])
def test_what_msgpack_does_not_know_is_not_sent(value: object) -> None:
    with pytest.raises(ipc.FrameError):
        ipc.encode("submit", value=value)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x81",
        msgpack.packb(7),
        msgpack.packb([1, 2]),
        msgpack.packb({"a": 1}),
        b"GET / HTTP/1.1",
    ],
    ids=["empty", "reserved byte", "cut map", "number", "list", "no type", "other protocol"],
)
def test_a_body_that_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(ipc.FrameError):
        ipc.decode(body)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_frame_error(body: bytes) -> None:
    try:
        message = ipc.decode(body)
    except ipc.FrameError:
        return
    assert isinstance(message["type"], str)


def test_a_request_comes_out_as_it_went_in() -> None:
    request = GenerationRequest(
        "r1",
        "tenant",
        [1, 2, 3],
        SamplingParams(max_tokens=5, seed=2**63, logit_bias={7: -1.5}, stop_token_ids=(6, 9)),
        adapter=AdapterRef("tenant", "tone", 3, "ab" * 32),
        timeout_s=1.5,
    )

    message = ipc.decode(body_of(ipc.encode("submit", request=ipc.request_map(request))))

    assert ipc.request_from_map(message["request"]) == request


def test_a_request_to_the_base_model_comes_out_as_it_went_in() -> None:
    request = GenerationRequest("r1", "tenant", [1], SamplingParams())

    message = ipc.decode(body_of(ipc.encode("submit", request=ipc.request_map(request))))

    assert ipc.request_from_map(message["request"]) == request


def test_an_output_comes_out_under_the_id_of_the_receiver() -> None:
    output = TokenOutput(
        "3/r1",
        [4, 5],
        [TokenLogprobs(4, -0.5, [(4, -0.5), (9, -2.0)]), TokenLogprobs(5, -0.25)],
        [TokenLogprobs(1, -3.0)],
        "error",
        ("corrupt_record", "broken"),
        16,
        3,
    )

    frame = ipc.encode("outputs", outputs=[ipc.output_row(output, request_id="r1")])
    [row] = ipc.decode(body_of(frame))["outputs"]

    assert ipc.output_from_row(row) == TokenOutput(**{**vars(output), "request_id": "r1"})


@pytest.mark.parametrize("row", [[], None, ["r", [1], [[1]], None, None, None, 0, 0], ["r"] * 8])
def test_a_row_that_is_no_output_is_refused(row: object) -> None:
    with pytest.raises(ipc.FrameError):
        ipc.output_from_row(row)  # type: ignore[arg-type]


def test_merged_outputs_hold_everything_in_order() -> None:
    first = TokenOutput(
        "r", [1], [TokenLogprobs(1, -1.0)], [TokenLogprobs(0, -2.0)], num_cached_tokens=8, num_distinct=2
    )
    second = TokenOutput("r", [2, 3], [TokenLogprobs(2, -2.0), TokenLogprobs(3, -3.0)], num_distinct=5)
    last = TokenOutput("r", finish_reason="error", error=("request_failed", "broken"))

    merged = merge_outputs([first, second, last])

    assert merged.token_ids == [1, 2, 3]
    assert [entry.token_id for entry in merged.logprobs] == [1, 2, 3]
    assert merged.prompt_logprobs == first.prompt_logprobs
    assert (merged.finish_reason, merged.error) == ("error", ("request_failed", "broken"))
    assert (merged.num_cached_tokens, merged.num_distinct) == (8, 5)


async def test_a_stream_ends_with_its_first_end() -> None:
    stream = OutputStream()
    stream.put(TokenOutput("r", [1]))
    stream.put(TokenOutput("r", finish_reason="cancelled"))
    stream.put(TokenOutput("r", [2]))
    stream.fail(RequestFailed("too late"))

    assert await stream.next() == TokenOutput("r", [1], finish_reason="cancelled")


async def test_a_stream_hands_out_what_came_before_its_error() -> None:
    stream = OutputStream()
    stream.put(TokenOutput("r", [1]))
    stream.fail(RequestFailed("broken"))

    assert (await stream.next()).token_ids == [1]
    with pytest.raises(RequestFailed, match="broken"):
        await stream.next()


@pytest.mark.parametrize(
    ("error", "arrives_as"),
    [
        (InvalidInput("too long", param="prompt", code="context_length_exceeded"), InvalidInput),
        (EngineOverloaded("full"), EngineOverloaded),
        (NotFound("gone", param="model", code="model_not_found"), NotFound),
        (AdapterDeleted("deleted"), Conflict),
        (StoreFull("full"), StoreFull),
        (TesseraError("odd"), RequestFailed),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_an_error_keeps_its_nearest_class_and_all_its_fields(
    error: TesseraError, arrives_as: type[TesseraError]
) -> None:
    message = ipc.decode(body_of(ipc.encode("refused", error=ipc.error_map(error))))
    arrived = ipc.error_from_map(message["error"])

    assert type(arrived) is arrives_as
    assert (arrived.message, arrived.code, arrived.param) == (error.message, error.code, error.param)


def test_an_error_text_with_half_a_character_is_sent() -> None:
    message = ipc.decode(body_of(ipc.encode("refused", error=ipc.error_map(InvalidInput("bad \ud800 text")))))

    assert "bad" in ipc.error_from_map(message["error"]).message


def test_numbers_that_json_does_not_know_are_sent() -> None:
    message = ipc.decode(body_of(ipc.encode("stats", value=float("-inf"), other=float("nan"))))

    assert message["value"] == float("-inf")
    assert math.isnan(message["other"])
