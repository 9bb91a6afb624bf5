"""The common part of the responses of both generation endpoints: numbers, usage, and the order of a stream's
events.

A stream: chunks of choices …, a chunk with finish_reason per choice, [a chunk with usage and no choices],
[DONE]
"""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, TypeVar

from service.engine.wire.messages import SamplingParams
from service.generation.generator import GenerationOptions
from service.generation.model_registry import Target
from service.generation.sequences import Generation, Piece, Usage
from service.generation.text import TextCodec
from service.http.event_stream import DONE, event
from service.http.schemas.common import AdapterUsed, Measured, PromptTokens, UsageReport
from service.http.schemas.generation import GenerationFields
from tessera.formats.adapter_ref import AdapterRef, checkpoint_step

#: OpenAI's number for the log-probability of an impossible token; JSON has no infinity.
IMPOSSIBLE = -9999.0

Body = TypeVar("Body", bound=GenerationFields)

_SAMPLING_FIELDS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "min_tokens", "seed",
)  # fmt: skip


def options_of(
    body: GenerationFields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> GenerationOptions:
    """Return the generation options of a request, where null means the default."""
    given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    sampling = SamplingParams(
        **given,
        top_k=max(0, body.top_k or 0),
        logit_bias={int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return GenerationOptions(
        n=body.n or 1,
        max_tokens=max_tokens,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=body.skip_special_tokens,
        include_stop=body.include_stop_str_in_output,
        sampling=sampling,
    )


def final_fields(target: Target, generation: Generation) -> dict[str, Any]:
    """Tessera's own fields of a whole response and of a stream's last chunks: adapter and figures."""
    adapter = target.adapter
    times_s = [sequence.ttft_s for sequence in generation.sequences if sequence.ttft_s is not None]
    measured = Measured(
        ttft_ms=round(1000 * min(times_s), 3) if times_s else None,
        max_distinct_in_batch=generation.max_distinct,
    )
    used = None if adapter is None else adapter_used(adapter).model_dump()
    return {"adapter": used, "x_tessera": measured.model_dump()}


def adapter_used(adapter: AdapterRef) -> AdapterUsed:
    """Return the adapter that has answered, as callers see it."""
    if checkpoint_step(adapter.version) is not None:
        return AdapterUsed(id=adapter.name, version=None)
    return AdapterUsed(id=adapter.adapter_id, version=adapter.version)


def usage_report(usage: Usage) -> UsageReport:
    """Return the counts of tokens in OpenAI's shape."""
    return UsageReport(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokens(cached_tokens=usage.cached_tokens),
    )


def json_logprob(value: float) -> float:
    """`value` as a number that JSON can express."""
    return value if math.isfinite(value) else math.copysign(IMPOSSIBLE, value)


class Reply(ABC):
    """One generation as the response that its client gets: whole, or as events."""

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self, body: GenerationFields, target: Target, generation: Generation, codec: TextCodec
    ) -> None:
        self.body = body
        self.target = target
        self.generation = generation
        self.codec = codec
        #: Fields that are known from the beginning, the same in a whole response and in every chunk.
        self.common_fields = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": target.name,
        }

    @abstractmethod
    def choices(self, piece: Piece, is_first: bool) -> list[dict[str, Any]]:
        """Return a piece as one or more choices, for a chunk each; the last one carries its finish_reason.

        is_first: whether the piece is the first of its choice.
        """

    def opening_fields(self, index: int) -> dict[str, Any]:
        """Fields of the first chunk of a choice, beside `choices`, for a client that wants token ids."""
        return {}

    def token_text(self, token_id: int, *, is_first: bool = False) -> str:
        """Return a token's name in this response's log-probabilities. is_first: no text comes before it."""
        if self.body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        skip = self.generation.skip_special_tokens
        return self.codec.token_text(token_id, is_first=is_first, skip_special_tokens=skip)

    def token_ids(self, ids: Sequence[int]) -> dict[str, list[int]]:
        """Return the field of a choice that lists its tokens, if the client wants token ids."""
        return {"token_ids": list(ids)} if self.body.return_token_ids else {}

    def prompt_token_ids(self, index: int) -> dict[str, list[int]]:
        """Return the field that lists the tokens of a choice's prompt, if the client wants token ids."""
        if not self.body.return_token_ids:
            return {}
        return {"prompt_token_ids": self.generation.sequences[index].request.token_ids}

    async def events(self) -> AsyncGenerator[str, None]:
        """Yield the response as server-sent events."""
        num_running = len(self.generation.sequences)
        started: set[int] = set()
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                is_first = piece.index not in started
                started.add(piece.index)
                if piece.finish_reason is not None:
                    num_running -= 1
                wants_opening = is_first and self.body.return_token_ids
                more = self.opening_fields(piece.index) if wants_opening else {}
                *before, last = self.choices(piece, is_first)
                for choice in before:
                    yield self._chunk([choice], more)
                    more = {}
                if not num_running:
                    more = {**more, **final_fields(self.target, self.generation)}
                yield self._chunk([last], more)
        options = self.body.stream_options
        if options is not None and options.include_usage:
            usage = usage_report(self.generation.usage).model_dump()
            yield self._chunk([], {"usage": usage, **final_fields(self.target, self.generation)})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        chunk = {**self.common_fields, "object": self.chunk_object, "choices": choices}
        options = self.body.stream_options
        if options is not None and options.include_usage:
            is_wanted = options.continuous_usage_stats
            chunk["usage"] = usage_report(self.generation.usage).model_dump() if is_wanted else None
        return event(chunk | more)
