"""Turn prompts and options into sequences: encode, check limits, make the engine's requests.

Knows no HTTP. A request that is wrong raises `InvalidInput` with the name of the parameter.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from service.engine.client.token_engine import TokenEngine
from service.engine.wire.messages import NOT_GENERATIVE, EngineInfo, GenerationRequest, SamplingParams
from service.generation.model_registry import Target
from service.generation.prompt_bound import prompt_bound
from service.generation.sequences import Generation, LiveSequence
from service.generation.text import TextCodec
from service.metrics.service_metrics import Metrics
from service.processes.fair_gate import FairGate
from tessera.errors import InvalidInput

#: Longer inputs are tokenised in a thread: 16 k characters take about 5 ms, the longest that the event loop
#: may be blocked.
MAX_INLINE_CHARACTERS = 16 * 1024
#: The fixed cost of one message and of one call of the tokenizer, expressed in characters.
MESSAGE_CHARACTERS, CALL_CHARACTERS = 32, 256
#: The most sequences of one request: prompts × n.
MAX_SEQUENCES = 256

T = TypeVar("T")


@dataclass(frozen=True)
class GenerationOptions:
    """How a prompt is continued."""

    #: Sequences per prompt.
    n: int = 1
    #: None: until the context is full. 0: read the prompt and generate nothing.
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    #: Whether special tokens have no text.
    skip_special_tokens: bool = True
    #: Whether the stop string or stop token that ends the text is a part of it.
    include_stop: bool = False
    #: Whether the client has seen the whole prompt, including an unfinished character at its end
    #: (`TextCodec.stream`).
    is_prompt_shown: bool = True
    #: Classify the prompt with the adapter's head; needs max_tokens 0.
    classifies: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)


class Generator:
    """Encodes prompts and prepares their generation."""

    def __init__(
        self,
        engine: TokenEngine,
        codec: TextCodec,
        metrics: Metrics,
        *,
        request_timeout_s: float,
        gate: FairGate | None = None,
    ) -> None:
        """gate: admits large inputs to a thread, fairly between tenants; None: a gate of its own."""
        self.codec = codec
        self.engine = engine
        self._gate = gate or heavy_gate()
        self._bound = prompt_bound(codec.chat.tokenizer.backend_tokenizer)
        self._metrics = metrics
        self._request_timeout_s = request_timeout_s

    def refuse_encoder(self) -> None:
        """Raise `InvalidInput` if the base model generates no texts."""
        if self.codec.chat.is_encoder:
            message = "the base model is an encoder, which generates no texts; send texts to /v1/classify"
            raise InvalidInput(message, param="model", code=NOT_GENERATIVE)

    async def text_prompts(self, tenant: str, texts: Sequence[str], *, param: str) -> list[list[int]]:
        """Return the token ids of raw prompts, encoded as the trainer encodes them. Raises `InvalidInput`."""
        self.refuse_encoder()
        for text in texts:
            self.refuse_endless(text, param=param)
        size = sum(len(text) + CALL_CHARACTERS for text in texts)
        return await self.off_loop(tenant, size, lambda: [self.codec.chat.text_ids(text) for text in texts])

    async def chat_prompt(
        self, tenant: str, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids of a conversation up to and with the opening of the assistant's turn.

        variables: further variables of the chat template. Raises `InvalidInput`.
        """
        self.refuse_encoder()
        for message in messages:
            if message["role"] != "assistant":  # a template may leave out parts of an assistant's turn
                self.refuse_endless(message["content"].strip(), param="messages")
        size = sum(len(message["content"]) + MESSAGE_CHARACTERS for message in messages)
        return await self.off_loop(
            tenant, size, lambda: self.codec.chat.prompt_ids(messages, variables=variables)
        )

    async def off_loop(self, tenant: str, size: int, work: Callable[[], T]) -> T:
        """Run `work` on an input of `size` characters: in a thread, once the gate admits the tenant, if it
        would block the event loop for too long. Tokenizers release Python's lock while they work.
        """
        if size <= MAX_INLINE_CHARACTERS and not self._gate.num_taken:
            return work()
        if size <= MAX_INLINE_CHARACTERS:  # a large input may hold the template renderer's lock
            return await asyncio.to_thread(work)
        async with self._gate.room(tenant):
            return await asyncio.to_thread(work)

    def refuse_endless(self, text: str, *, param: str) -> None:
        """Refuse a text that cannot fit however it is tokenised, because tokenising it may take seconds.

        Raises `InvalidInput`.
        """
        limit, bound = self.engine.info.max_model_len, self._bound
        if bound is None:
            return
        if len(text) > limit * (bound.ascii_chars if text.isascii() else bound.other_chars):
            raise InvalidInput(
                f"the context holds {limit} tokens; {len(text)} characters are certainly more",
                param=param,
                code="context_length_exceeded",
            )

    def prepare(
        self,
        target: Target,
        prompts: Sequence[list[int]],
        options: GenerationOptions,
        *,
        param: str,
        first_lengths: Sequence[int] = (),
    ) -> Generation:
        """Prepare n sequences for every prompt, prompts outermost. They are submitted to the engine when the
        pieces of the returned generation are read.

        param: the field of the request that held the prompts. first_lengths: of each prompt to classify, see
        `GenerationRequest`. Raises `InvalidInput`, `EngineUnavailable`.
        """
        if not options.classifies:
            self.refuse_encoder()
        info = self.engine.info
        if len(prompts) * options.n > MAX_SEQUENCES:
            raise InvalidInput(f"the number of prompts times n must be at most {MAX_SEQUENCES}", param=param)
        for field_name in ("logit_bias", "stop_token_ids"):
            for token_id in getattr(options.sampling, field_name):
                if not 0 <= token_id < info.vocab_size:
                    message = f"{token_id} is not a token id; token ids are 0 to {info.vocab_size - 1}"
                    raise InvalidInput(message, param=field_name)
        sequences: list[LiveSequence] = []
        for index, token_ids in enumerate(prompts):
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
                    timeout_s=self._request_timeout_s,
                    classifies=options.classifies,
                    first_length=first_lengths[index] if first_lengths else 0,
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
        self, token_ids: list[int], options: GenerationOptions, info: EngineInfo, param: str
    ) -> SamplingParams:
        """Return the parameters for one prompt: how many tokens may follow it, and which tokens end them."""
        if not token_ids:
            raise InvalidInput("the prompt is empty", param=param, code="empty_prompt")
        if len(token_ids) > info.max_model_len:  # first, so that the checks below never read a million ids
            raise too_long(len(token_ids), options.max_tokens or 1, info.max_model_len, param)
        if not 0 <= min(token_ids) <= max(token_ids) < info.vocab_size:
            raise InvalidInput(f"token ids must be from 0 to {info.vocab_size - 1}", param=param)
        num_left = info.max_model_len - len(token_ids)
        max_tokens = max(1, num_left) if options.max_tokens is None else options.max_tokens
        if max_tokens > num_left:
            raise too_long(len(token_ids), max_tokens, info.max_model_len, param)
        if options.sampling.min_tokens > max_tokens:
            message = f"min_tokens is {options.sampling.min_tokens}, above max_tokens, which is {max_tokens}"
            raise InvalidInput(message, param="min_tokens")
        eos = () if options.ignore_eos else self.codec.eos_token_ids
        stop_token_ids = tuple(dict.fromkeys((*options.sampling.stop_token_ids, *eos)))
        return replace(options.sampling, max_tokens=max_tokens, stop_token_ids=stop_token_ids)


def too_long(num_prompt: int, num_more: int, max_model_len: int, param: str) -> InvalidInput:
    """Return the error for a prompt that leaves no room in the context for `num_more` tokens."""
    more = f" and the answer up to {num_more}" if num_more else ""
    return InvalidInput(
        f"the context holds {max_model_len} tokens; the prompt has {num_prompt}{more}",
        param=param,
        code="context_length_exceeded",
    )


def heavy_gate() -> FairGate:
    """Return a gate for work on large inputs: two at a time and one per tenant, so that no tenant blocks the
    others."""
    return FairGate(capacity=2, share=1)
