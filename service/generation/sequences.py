"""Running sequences: the engine's tokens become pieces of text, and several sequences become one stream.

Knows the engine's messages and the text codec, but neither HTTP nor JSON.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from service.engine.client.token_engine import TokenEngine
from service.engine.wire.messages import (
    NO_HEAD,
    NOT_GENERATIVE,
    Classification,
    GenerationRequest,
    TokenLogprobs,
    TokenOutput,
)
from service.errors import DeadlineExceeded
from service.generation.text import TextStream
from service.metrics.service_metrics import Metrics
from tessera.errors import (
    Conflict,
    CorruptRecord,
    InvalidInput,
    InvalidTrainingData,
    NotFound,
    RequestFailed,
    TesseraError,
)
from tessera.processes.tasks import end_tasks


@dataclass(frozen=True)
class Token:
    """A generated token with its log-probability."""

    logprobs: TokenLogprobs
    #: Where the token's text begins in the sequence's text.
    offset: int
    #: Whether no text stands before the token, so that it may lose its space.
    is_first: bool = False
    #: Whether the token ended the sequence and is not a part of the text.
    is_end: bool = False


@dataclass(frozen=True)
class Piece:
    """The part of a sequence that has become certain since the piece before."""

    #: The number of the sequence within its generation.
    index: int
    text: str = ""
    #: The tokens whose text has begun to show, if the request wants log-probabilities.
    tokens: tuple[Token, ...] = ()
    #: All tokens that came since the piece before, whether their text shows or not.
    token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    classification: Classification | None = None


@dataclass
class Finished:
    """A whole sequence, joined from its pieces."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    classification: Classification | None = None


@dataclass
class Usage:
    """The tokens of one API request. A prompt that is continued n times counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class LiveSequence:
    """One sequence that the engine continues. Leaving `pieces` in any way ends it in the engine as well."""

    def __init__(self, index: int, request: GenerationRequest, text: TextStream, metrics: Metrics) -> None:
        #: The number of the sequence within its generation.
        self.index = index
        self.request = request
        #: Generated tokens.
        self.num_tokens = 0
        #: Tokens of the prompt that the engine found in its prefix cache.
        self.num_cached_tokens = 0
        #: The most distinct models (adapters, base) that shared a step with the sequence.
        self.max_distinct = 0
        #: Time to the first token.
        self.ttft_s: float | None = None
        self._text = text
        self._metrics = metrics
        self._newest_at = time.monotonic()
        self._num_shown_chars = 0
        #: Tokens with log-probabilities whose text does not show yet.
        self._waiting: deque[Token] = deque()
        #: Ids of tokens that no piece has carried yet.
        self._unsent_ids: list[int] = []

    async def pieces(self, engine: TokenEngine) -> AsyncGenerator[Piece, None]:
        """Pieces up to the one that has a finish_reason. Raises the error with which the engine gave up."""
        async with aclosing(engine.generate(self.request)) as outputs:
            async for output in outputs:
                piece = self._read(output)
                if piece.text or piece.finish_reason or piece.prompt_logprobs:
                    yield piece
                if piece.finish_reason:
                    return
        raise RequestFailed("the engine ended a sequence without a finish_reason")

    def _read(self, output: TokenOutput) -> Piece:
        if output.error is not None or output.finish_reason in ("error", "cancelled"):
            raise error_of(output)
        now = time.monotonic()
        waited_s, self._newest_at = now - self._newest_at, now
        if self.ttft_s is None:
            self.ttft_s = waited_s
            self._metrics.time_to_first_token.observe(waited_s)
        elif output.token_ids:
            self._metrics.inter_token_latency.observe(waited_s / len(output.token_ids))
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.max_distinct = max(self.max_distinct, output.num_distinct)
        prompt = None if output.prompt_logprobs is None else tuple(output.prompt_logprobs)
        finish_reason = output.finish_reason
        text = ""
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            self._unsent_ids.append(token_id)
            logprobs = output.logprobs[position] if output.logprobs else None
            ends = finish_reason == "stop" and position == len(output.token_ids) - 1
            if ends and not self._text.includes_stop and token_id in self.request.sampling.stop_token_ids:
                text += self._end(logprobs)
                break
            if logprobs is not None:
                self._waiting.append(Token(logprobs, self._text.length, self._text.is_at_start))
            text += self._text.push(token_id)
            if self._text.is_stopped:
                finish_reason = "stop"
                break
        if finish_reason is not None:
            text += self._text.flush()
        token_ids: tuple[int, ...] = ()
        if text or finish_reason or prompt:  # this piece will be sent
            token_ids = tuple(self._unsent_ids)
            self._unsent_ids.clear()
        self._num_shown_chars += len(text)
        shown = self._shown_tokens(finish_reason) if self._waiting else ()
        return Piece(self.index, text, shown, token_ids, prompt, finish_reason, output.classification)

    def _end(self, logprobs: TokenLogprobs | None) -> str:
        """Return the rest of the text before a stop token that is not a part of it."""
        text = self._text.flush()
        if logprobs is not None:
            self._waiting.append(Token(logprobs, self._text.length, is_end=True))
        return text

    def _shown_tokens(self, finish_reason: str | None) -> tuple[Token, ...]:
        """Return the waiting tokens whose text has begun to show; at the end, all except those after a stop
        string."""
        is_cut = finish_reason is None or self._text.is_stopped
        shown = []
        while self._waiting and (not is_cut or self._waiting[0].offset < self._num_shown_chars):
            shown.append(self._waiting.popleft())
        return tuple(shown)


@dataclass
class Generation:
    """All sequences of one API request: n for each prompt, prompts outermost."""

    sequences: list[LiveSequence]
    engine: TokenEngine
    metrics: Metrics
    n: int = 1
    skip_special_tokens: bool = True
    started_at: float = field(default_factory=time.monotonic)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all sequences as they arrive. Leaving it cancels the sequences that still
        run."""
        outcome = "cancelled"
        try:
            sources = [sequence.pieces(self.engine) for sequence in self.sequences]
            source = sources[0] if len(sources) == 1 else merge(sources)
            async with aclosing(source) as pieces:
                async for piece in pieces:
                    yield piece
            outcome = "finished"
        except TesseraError:
            outcome = "failed"
            raise
        finally:
            duration_s = time.monotonic() - self.started_at
            self.metrics.generation_ended(outcome, duration_s, self.max_distinct)

    async def collect(self) -> list[Finished]:
        """Wait for all sequences and return them whole, in order."""
        finished = [Finished() for _ in self.sequences]
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                whole = finished[piece.index]
                whole.text += piece.text
                whole.tokens += piece.tokens
                whole.token_ids += piece.token_ids
                whole.prompt_logprobs += piece.prompt_logprobs or ()
                whole.finish_reason = piece.finish_reason
                whole.classification = piece.classification
        return finished

    @property
    def max_distinct(self) -> int:
        """The most distinct models (adapters, base) that shared a step with one of the sequences."""
        return max((s.max_distinct for s in self.sequences), default=0)

    @property
    def usage(self) -> Usage:
        """The counts of tokens; each prompt counts once, whatever n is."""
        first_of_prompt = self.sequences[:: self.n]
        return Usage(
            prompt_tokens=sum(len(s.request.token_ids) for s in first_of_prompt),
            completion_tokens=sum(s.num_tokens for s in self.sequences),
            cached_tokens=sum(s.num_cached_tokens for s in first_of_prompt),
        )


async def merge(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Yield the items of several sources as they arrive; the first error ends all. Closing it closes the
    sources."""
    # Bounded, so that unread outputs wait in `connection.py`, which counts their memory.
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(len(sources))
    tasks = [asyncio.create_task(_pump(source, queue)) for source in sources]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        await end_tasks(*tasks)


async def _pump(source: AsyncGenerator[Piece, None], queue: asyncio.Queue[Piece | Exception | None]) -> None:
    async with aclosing(source):
        try:
            async for item in source:
                await queue.put(item)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)


def error_of(output: TokenOutput) -> TesseraError:
    """Return the exception for an error output of the engine, chosen by its `code`."""
    if output.error is None:
        return RequestFailed("the request was cancelled", code="cancelled")
    code, message = output.error
    cls = _BY_CODE.get(code, NotFound if code.endswith("_not_found") else RequestFailed)
    is_adapters = issubclass(cls, NotFound | Conflict | CorruptRecord) or code in _OTHER_TASKS
    return cls(message, code=code, param="model" if is_adapters else None)


def _error_classes(root: type[TesseraError]) -> list[type[TesseraError]]:
    return [root, *(found for child in root.__subclasses__() for found in _error_classes(child))]


#: A class without a code of its own shares its parent's, and the parent wins. `InvalidTrainingData` never
#: comes from the engine, and its constructor takes a list of problems.
_BY_CODE: dict[str, type[TesseraError]] = {
    cls.code: cls
    for cls in reversed(_error_classes(TesseraError))
    if not issubclass(cls, InvalidTrainingData)
}
_BY_CODE[DeadlineExceeded.code] = DeadlineExceeded
#: Requests for what the adapter was not trained for.
_OTHER_TASKS = (NO_HEAD, NOT_GENERATIVE)
_BY_CODE |= dict.fromkeys(_OTHER_TASKS, InvalidInput)
