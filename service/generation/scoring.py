"""Score a given text by its log-probability, the measure by which adapters are compared.

The engine reads each text as a prompt and reports the log-probability of every token after the first. The
mask that selects the tokens to train on also selects the tokens that count here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from service.engine.wire.messages import SamplingParams, TokenLogprobs
from service.generation.generator import (
    CALL_CHARACTERS,
    MAX_SEQUENCES,
    MESSAGE_CHARACTERS,
    GenerationOptions,
    Generator,
)
from service.generation.model_registry import Target
from service.generation.sequences import Finished, Generation
from tessera.chat.chat_format import EncodedExample
from tessera.data.examples import Example
from tessera.errors import InvalidInput, RequestFailed

#: Report the log-probabilities of the prompt, and generate nothing.
_PROMPT_ONLY = GenerationOptions(max_tokens=0, sampling=SamplingParams(temperature=0.0, prompt_logprobs=0))


@dataclass(frozen=True)
class ScoredText:
    """One item of a scoring request."""

    #: Token ids. A conversation has several rows if its answers cannot share one (`tessera/chat/rows.py`).
    rows: tuple[list[int], ...]
    #: Log-probabilities in nats of the tokens after the first one of each row.
    logprobs: tuple[TokenLogprobs, ...]
    #: Whether each of these tokens counts.
    is_counted: tuple[bool, ...]

    @property
    def num_counted(self) -> int:
        return sum(self.is_counted)

    @property
    def sum_logprob(self) -> float:
        return sum(t.logprob for t, counts in zip(self.logprobs, self.is_counted, strict=True) if counts)

    @property
    def loss(self) -> float:
        """Mean negative log-probability of the counted tokens, in nats."""
        return -self.sum_logprob / self.num_counted


async def score(
    generator: Generator, target: Target, examples: Sequence[Example]
) -> tuple[list[ScoredText], Generation]:
    """Score all examples in one generation, and return that as well. Raises `InvalidInput` (param
    "input.<i>")."""
    generator.refuse_encoder()
    limit = generator.engine.info.max_model_len
    for index, example in enumerate(examples):
        for text in _texts(example):
            generator.refuse_endless(text, param=f"input.{index}")
    size = sum(_size(example) for example in examples)
    encoded = await generator.off_loop(
        target.tenant, size, lambda: [_encode(generator, e, index, limit) for index, e in enumerate(examples)]
    )
    prompts = [list(row.token_ids) for rows in encoded for row in rows]
    if len(prompts) > MAX_SEQUENCES:
        message = f"the input takes {len(prompts)} rows, the limit is {MAX_SEQUENCES}; send fewer items"
        raise InvalidInput(message, param="input")
    generation = generator.prepare(target, prompts, _PROMPT_ONLY, param="input")
    finished = iter(await generation.collect())
    return [_scored(rows, list(islice(finished, len(rows)))) for rows in encoded], generation


def _encode(generator: Generator, example: Example, index: int, limit: int) -> list[EncodedExample]:
    param = f"input.{index}"
    try:
        rows = generator.codec.chat.encode_rows(example, max_tokens=limit)
    except InvalidInput as error:
        raise InvalidInput(error.message, param=param, code=error.code) from error
    if any(row.truncated for row in rows):
        raise InvalidInput(
            f"the text has more tokens than the context holds, which is {limit}",
            param=param,
            code="context_length_exceeded",
        )
    return rows


def _scored(rows: Sequence[EncodedExample], finished: Sequence[Finished]) -> ScoredText:
    logprobs: list[TokenLogprobs] = []
    is_counted: list[bool] = []
    for row, sequence in zip(rows, finished, strict=True):
        if len(sequence.prompt_logprobs) != len(row.token_ids) - 1:
            raise RequestFailed("the engine did not report every token of the prompt")
        logprobs += sequence.prompt_logprobs
        is_counted += map(bool, row.loss_mask[1:])
    return ScoredText(tuple(list(row.token_ids) for row in rows), tuple(logprobs), tuple(is_counted))


def _texts(example: Example) -> list[str]:
    texts = [example.prompt, example.completion, example.text]
    contents = [message["content"] for message in example.messages or ()]
    return [*contents, *(text for text in texts if text)]


def _size(example: Example) -> int:
    return CALL_CHARACTERS + sum(len(text) + MESSAGE_CHARACTERS for text in _texts(example))
