"""From a prompt and options to sequences in flight: tokens, limits, the engine's requests.

Knows no HTTP: what is wrong with a request is an `InvalidInput` that names the parameter.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from service.engine.client.token_engine import TokenEngine
from service.engine.wire.messages import EngineInfo, GenerationRequest, SamplingParams
from service.generation.model_resolver import Target
from service.generation.prompt_bound import prompt_bound
from service.generation.sequences import Generation, LiveSequence
from service.generation.text import TextCodec
from service.metrics.service_metrics import Metrics
from service.processes.fair_gate import FairGate
from tessera.errors import InvalidInput

#: Tokenising 16 k characters takes about 5 ms, as long as the event loop may stand still.
MAX_INLINE_CHARACTERS = 16 * 1024
#: What a message of a conversation and a call of the tokenizer cost beside their characters, in characters.
MESSAGE_CHARACTERS, CALL_CHARACTERS = 32, 256
#: Sequences of one request: prompts × n.
MAX_SEQUENCES = 256

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How a prompt is continued.

    max_tokens: None as far as the context goes, 0 not at all. skip_special_tokens: they have no text.
    include_stop: the stop string or stop token that ends the text is a part of it. is_prompt_shown: the
    client has seen the prompt whole, also an unfinished character at its end (`TextCodec.stream`).
    """

    n: int = 1
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop: bool = False
    is_prompt_shown: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)


class Generator:
    """Starts generations."""

    def __init__(
        self,
        engine: TokenEngine,
        codec: TextCodec,
        metrics: Metrics,
        *,
        request_timeout_s: float,
        gate: FairGate | None = None,
    ) -> None:
        """gate: for inputs that are read beside the event loop, by tenant; None: one of its own."""
        self.codec = codec
        self.engine = engine
        self._gate = gate or heavy_gate()
        self._bound = prompt_bound(codec.chat.tokenizer.backend_tokenizer)
        self._metrics = metrics
        self._request_timeout_s = request_timeout_s

    async def text_prompts(self, tenant: str, texts: Sequence[str], *, param: str) -> list[list[int]]:
        """Token ids of raw prompts, as the trainer would encode them. Raises `InvalidInput`."""
        for text in texts:
            self.refuse_endless(text, param=param)
        size = sum(len(text) + CALL_CHARACTERS for text in texts)
        return await self.off_loop(tenant, size, lambda: [self.codec.chat.text_ids(text) for text in texts])

    async def chat_prompt(
        self, tenant: str, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation up to the assistant's turn. variables: more names for the template.

        Raises `InvalidInput`.
        """
        for message in messages:
            if message["role"] != "assistant":  # of whose turns a template may leave out parts
                self.refuse_endless(message["content"].strip(), param="messages")
        size = sum(len(message["content"]) + MESSAGE_CHARACTERS for message in messages)
        return await self.off_loop(
            tenant, size, lambda: self.codec.chat.prompt_ids(messages, variables=variables)
        )

    async def off_loop(self, tenant: str, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on an input of `size` characters: beside the event loop if it would hold it
        up, in the tenant's turn. Tokenizers give up Python's lock while they work.
        """
        if size <= MAX_INLINE_CHARACTERS and not self._gate.num_taken:
            return work()
        if size <= MAX_INLINE_CHARACTERS:  # a large input may hold the lock of the template's renderer
            return await asyncio.to_thread(work)
        async with self._gate.room(tenant):
            return await asyncio.to_thread(work)

    def refuse_endless(self, text: str, *, param: str) -> None:
        """Raise `InvalidInput` for a text that cannot fit however it is tokenised, which may take seconds."""
        limit, bound = self.engine.info.max_model_len, self._bound
        if bound is None:
            return
        if len(text) > limit * (bound.ascii_chars if text.isascii() else bound.other_chars):
            raise InvalidInput(
                f"the context holds {limit} tokens; {len(text)} characters are certainly more",
                param=param,
                code="context_length_exceeded",
            )

    def start(
        self, target: Target, prompts: Sequence[list[int]], options: Options, *, param: str
    ) -> Generation:
        """n sequences for every prompt, prompts outermost; the engine sees them when the pieces are read.

        param: the field that held the prompts. Raises `InvalidInput`, `EngineUnavailable`.
        """
        info = self.engine.info
        if len(prompts) * options.n > MAX_SEQUENCES:
            raise InvalidInput(f"prompts × n must be at most {MAX_SEQUENCES}", param=param)
        for field_name in ("logit_bias", "stop_token_ids"):
            for token_id in getattr(options.sampling, field_name):
                if not 0 <= token_id < info.vocab_size:
                    message = f"{token_id} is not a token id; token ids are 0 to {info.vocab_size - 1}"
                    raise InvalidInput(message, param=field_name)
        sequences: list[LiveSequence] = []
        for token_ids in prompts:
            shared = self._sampling(token_ids, options, info, param)
            for choice in range(options.n):
                sampling = shared
                if sampling.seed is not None:  # the choices of one prompt must differ
                    sampling = replace(sampling, seed=(sampling.seed + choice) % 2**63)
                request = GenerationRequest(
                    request_id=uuid.uuid4().hex,
                    tenant=target.tenant,
                    token_ids=token_ids,
                    sampling=sampling,
                    adapter=target.adapter,
                    deadline_s=self._request_timeout_s,
                )
                text = self.codec.stream(
                    token_ids,
                    stop=options.stop,
                    min_tokens=sampling.min_tokens,
                    skip_special_tokens=options.skip_special_tokens,
                    include_stop=options.include_stop,
                    is_prompt_shown=options.is_prompt_shown,
                )
                sequences.append(LiveSequence(len(sequences), request, text, self._metrics))
        return Generation(sequences, self.engine, self._metrics, options.n, options.skip_special_tokens)

    def _sampling(
        self, token_ids: list[int], options: Options, info: EngineInfo, param: str
    ) -> SamplingParams:
        """The parameters for one prompt: how many tokens it may have, what ends it."""
        if not token_ids:
            raise InvalidInput("the prompt is empty", param=param, code="empty_prompt")
        if len(token_ids) > info.max_model_len:  # before anything looks at each of a million ids
            raise too_long(len(token_ids), options.max_tokens or 1, info.max_model_len, param)
        if not 0 <= min(token_ids) <= max(token_ids) < info.vocab_size:
            raise InvalidInput(f"token ids must be from 0 to {info.vocab_size - 1}", param=param)
        room = info.max_model_len - len(token_ids)
        max_tokens = max(1, room) if options.max_tokens is None else options.max_tokens
        if max_tokens > room:
            raise too_long(len(token_ids), max_tokens, info.max_model_len, param)
        if options.sampling.min_tokens > max_tokens:
            raise InvalidInput("min_tokens exceeds max_tokens", param="min_tokens")
        eos = () if options.ignore_eos else self.codec.eos_token_ids
        stop_token_ids = tuple(dict.fromkeys((*options.sampling.stop_token_ids, *eos)))
        return replace(options.sampling, max_tokens=max_tokens, stop_token_ids=stop_token_ids)


def too_long(num_prompt: int, num_more: int, max_model_len: int, param: str) -> InvalidInput:
    more = f" and up to {num_more} more were asked for" if num_more else ""
    return InvalidInput(
        f"the context holds {max_model_len} tokens; the prompt has {num_prompt}{more}",
        param=param,
        code="context_length_exceeded",
    )


def heavy_gate() -> FairGate:
    """For work on large inputs: two at once, one of each tenant, so that nobody keeps the others out."""
    return FairGate(capacity=2, share=1)
