"""Classify texts with the head of an adapter.

The engine reads each text as a prompt and applies the head to its last hidden state. Texts and pairs of texts
become token ids in the same way as in training (`ChatFormat.labelled_ids`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.engine.wire.messages import Classification, SamplingParams
from service.generation.generator import CALL_CHARACTERS, GenerationOptions, Generator
from service.generation.model_registry import Target
from service.generation.sequences import Generation
from tessera.errors import InvalidInput, RequestFailed

#: Read the prompt, classify it, and generate nothing.
_CLASSIFY = GenerationOptions(max_tokens=0, sampling=SamplingParams(temperature=0.0), classifies=True)


@dataclass(frozen=True)
class ClassifiedText:
    """The outcome for one text."""

    #: The most likely class; None for a regression.
    label: str | None
    #: The probability of each class, by index; for a regression its score alone.
    probs: tuple[float, ...]


async def classify(
    generator: Generator, target: Target, texts: Sequence[tuple[str, str | None]], *, param: str
) -> tuple[list[ClassifiedText], Generation]:
    """Classify all texts, each alone or with a second one, in one generation, and return that as well.

    Raises `InvalidInput`; its param is `param` with the index of a text that is too long.
    """
    limit = generator.engine.info.max_model_len
    for index, pair in enumerate(texts):
        for text in pair:
            generator.refuse_endless(text or "", param=f"{param}.{index}")
    size = sum(len(text) + len(second or "") + CALL_CHARACTERS for text, second in texts)
    chat = generator.codec.chat
    prompts = await generator.off_loop(
        target.tenant, size, lambda: [chat.labelled_ids(text, second) for text, second in texts]
    )
    for index, prompt in enumerate(prompts):
        if len(prompt.token_ids) > limit:
            raise InvalidInput(
                f"the text has {len(prompt.token_ids)} tokens, more than the context holds, which is {limit}",
                param=f"{param}.{index}",
                code="context_length_exceeded",
            )
    generation = generator.prepare(
        target,
        [prompt.token_ids for prompt in prompts],
        _CLASSIFY,
        param=param,
        first_lengths=[prompt.first_length for prompt in prompts],
    )
    finished = await generation.collect()
    return [_classified(sequence.classification) for sequence in finished], generation


def _classified(found: Classification | None) -> ClassifiedText:
    if found is None:
        raise RequestFailed("the engine did not report the class of a text")
    if not found.labels:
        return ClassifiedText(None, tuple(found.scores))
    probs = _softmax(found.scores)
    return ClassifiedText(found.labels[probs.index(max(probs))], probs)


def _softmax(scores: Sequence[float]) -> tuple[float, ...]:
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)
