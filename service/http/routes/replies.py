"""What the answers of both generation endpoints share: numbers, usage, and the order of a stream's events.

choice chunks …, a chunk with finish_reason per choice, [a chunk with usage and no choices], [DONE]
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
from service.generation.generator import Options
from service.generation.model_resolver import Target
from service.generation.sequences import Generation, Piece, Usage
from service.generation.text import TextCodec
from service.http.event_stream import DONE, event
from service.http.schemas.common import AdapterUsed, Measured, PromptTokens, UsageReport
from service.http.schemas.generation import GenerationFields

#: JSON has no infinity; OpenAI writes this for what cannot happen.
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
) -> Options:
    """The domain's options of a request; null means the default."""
    given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    sampling = SamplingParams(
        **given,
        top_k=max(0, body.top_k or 0),
        logit_bias={int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return Options(
        n=body.n or 1,
        max_tokens=max_tokens,
        stop=body.stop_strings,
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=body.skip_special_tokens,
        include_stop=body.include_stop_str_in_output,
        sampling=sampling,
    )


def adapter_used(target: Target) -> AdapterUsed | None:
    adapter = target.adapter
    return None if adapter is None else AdapterUsed(id=adapter.adapter_id, version=adapter.version)


def measured(generation: Generation) -> Measured:
    ttft_ms = generation.ttft_ms
    return Measured(
        ttft_ms=None if ttft_ms is None else round(ttft_ms, 3), max_distinct_in_batch=generation.max_distinct
    )


def usage_report(usage: Usage) -> UsageReport:
    return UsageReport(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokens(cached_tokens=usage.cached_tokens),
    )


def json_logprob(value: float) -> float:
    """`value` as JSON can say it."""
    return value if math.isfinite(value) else math.copysign(IMPOSSIBLE, value)


class Reply(ABC):
    """One generation on its way to the client."""

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self, body: GenerationFields, target: Target, generation: Generation, codec: TextCodec
    ) -> None:
        self.body = body
        self.target = target
        self.generation = generation
        self.codec = codec
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._begun: set[int] = set()

    @abstractmethod
    def choices(self, piece: Piece) -> list[dict[str, Any]]:
        """The choices of a piece's chunks, one chunk each; the last one has its finish_reason, if any."""

    def token_text(self, token_id: int, *, is_first: bool = False) -> str:
        """What a token is called in this answer's log-probabilities; is_first: with no text before it."""
        if self.body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        skip = self.generation.skip_special_tokens
        return self.codec.token_text(token_id, is_first=is_first, skip_special_tokens=skip)

    def token_ids(self, ids: Sequence[int]) -> dict[str, list[int]]:
        """The field of a choice that lists its tokens, if it was asked for."""
        return {"token_ids": list(ids)} if self.body.return_token_ids else {}

    def prompt_token_ids(self, index: int) -> dict[str, list[int]]:
        """The field that lists the tokens of a choice's prompt, if it was asked for."""
        if not self.body.return_token_ids:
            return {}
        return {"prompt_token_ids": self.generation.sequences[index].request.token_ids}

    def opening(self, index: int) -> dict[str, Any]:
        """Own fields of the first chunk of a choice."""
        return {}

    def begins(self, piece: Piece) -> bool:
        """Whether a piece is the first one of its choice."""
        is_first = piece.index not in self._begun
        self._begun.add(piece.index)
        return is_first

    def ending(self) -> dict[str, Any]:
        """Own fields of the whole answer, and of a stream's last chunks."""
        adapter = adapter_used(self.target)
        return {
            "adapter": None if adapter is None else adapter.model_dump(),
            "x_tessera": measured(self.generation).model_dump(),
        }

    def head(self) -> dict[str, Any]:
        """Fields of the whole answer that are known before it."""
        return {"id": self.id, "created": self.created, "model": self.target.name}

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events."""
        num_running = len(self.generation.sequences)
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                num_running -= piece.finish_reason is not None
                more = {} if piece.index in self._begun else self.opening(piece.index)
                *before, last = self.choices(piece)
                for choice in before:
                    yield self._chunk([choice], more)
                    more = {}
                yield self._chunk([last], more if num_running else {**more, **self.ending()})
        if self.body.has_usage_chunk:
            usage = usage_report(self.generation.usage).model_dump()
            yield self._chunk([], {"usage": usage, **self.ending()})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> str:
        usage = {"usage": self._usage_so_far()} if self.body.has_usage_chunk else {}
        head = self.head()
        return event({**head, "object": self.chunk_object, "choices": choices, **usage, **(more or {})})

    def _usage_so_far(self) -> dict[str, Any] | None:
        """In every chunk, if it was asked for."""
        if not self.body.has_continuous_usage:
            return None
        return usage_report(self.generation.usage).model_dump()
