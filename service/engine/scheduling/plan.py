"""The plan of one step: what the scheduler has decided to compute, before any tensor is made of it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from service.engine.scheduling.request import PENDING, EngineRequest

_NOTHING = range(0)
_end = operator.attrgetter("end")
_is_plain = operator.attrgetter("is_plain")


class Chunk:
    """The tokens start .. end - 1 of a request: the step computes their KV.

    The other fields follow from the request at the time when the chunk is made, because the request changes
    before the results arrive.
    """

    # One per request and step. A dataclass with these fields takes twice as long to make, a frozen one five
    # times.
    __slots__ = (
        "classifies",
        "end",
        "is_last",
        "is_pending",
        "is_plain",
        "length",
        "prompt_positions",
        "request",
        "samples",
        "start",
    )

    def __init__(self, request: EngineRequest, start: int, length: int) -> None:
        token_ids = request.token_ids
        end = start + length
        is_last = end == len(token_ids)
        samples = is_last and end < request.max_length
        self.request = request
        self.start = start
        self.length = length
        self.end = end
        #: Whether every token of the request so far is computed after this chunk.
        self.is_last = is_last
        #: Whether the last token of the chunk is sampled but not known yet.
        self.is_pending = is_last and token_ids[-1] == PENDING
        #: Whether the last hidden state of the chunk is classified.
        self.classifies = is_last and request.classifies
        #: Whether the last logits of the chunk choose the next token.
        self.samples = samples
        #: Whether they do nothing else, and choose the largest logit.
        self.is_plain = samples and request.is_plain
        #: Positions whose logits are scored against the next prompt token.
        self.prompt_positions = _NOTHING
        if request.needs_prompt_logprobs:
            self.prompt_positions = range(start, min(end, request.num_prompt - 1))


@dataclass
class StepPlan:
    """One step."""

    #: First the chunks of one token, longest context first, then the others. They do not change any more.
    chunks: list[Chunk] = field(default_factory=list)
    #: KV blocks to be cleared, because they belonged to another request before.
    fresh_blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum([chunk.length for chunk in self.chunks])

    @cached_property
    def is_plain(self) -> bool:
        """Whether every chunk samples the largest logit and does nothing else. This is the usual step, and
        the one that must take the least time."""
        return all(map(_is_plain, self.chunks))

    @cached_property
    def is_decode(self) -> bool:
        """Whether every chunk is one token that samples and scores nothing."""
        has_long = bool(self.chunks) and self.chunks[-1].length > 1
        return not has_long and (
            self.is_plain or all(c.samples and not c.prompt_positions for c in self.chunks)
        )

    @cached_property
    def classifying(self) -> list[int]:
        """The chunks whose last hidden state is classified."""
        return [] if self.is_plain else [i for i, chunk in enumerate(self.chunks) if chunk.classifies]

    @cached_property
    def basis_ids(self) -> set[str | None]:
        """The bases of the adapters in the step; None is the base model alone."""
        return {chunk.request.basis_id for chunk in self.chunks}

    @cached_property
    def num_distinct(self) -> int:
        """Number of different models in the step: adapter versions, and the base model if it is among
        them."""
        return len({chunk.request.model_key for chunk in self.chunks})


class StepBuilder:
    """A plan that grows within the limits of one step."""

    def __init__(self, max_tokens: int, max_logit_rows: int) -> None:
        self.num_tokens_left = max_tokens
        self.fresh_blocks: list[int] = []
        self._num_logit_rows_left = max_logit_rows
        self._single: list[Chunk] = []
        self._long: list[Chunk] = []

    def add_decodes(self, requests: Sequence[EngineRequest]) -> None:
        """Add the one token that each request has to compute. It scores nothing, since the prompt is done."""
        self._single += [Chunk(request, request.num_computed, 1) for request in requests]
        self.num_tokens_left -= len(requests)

    def add_prefill(self, request: EngineRequest, *, is_alone: bool) -> None:
        """Add as many tokens of a request as are left; half of them if others could use some, so that a long
        prompt does not delay the short ones that come after it."""
        share = self.num_tokens_left if is_alone else -(-self.num_tokens_left // 2)
        if request.needs_prompt_logprobs:  # one row of logits per token
            share = min(share, max(1, self._num_logit_rows_left))
        num_uncomputed = len(request.token_ids) - request.num_computed
        chunk = Chunk(request, request.num_computed, min(num_uncomputed, share))
        (self._single if chunk.length == 1 else self._long).append(chunk)
        self.num_tokens_left -= chunk.length
        self._num_logit_rows_left -= len(chunk.prompt_positions)

    def finish(self) -> StepPlan:
        assert self.num_tokens_left >= 0
        self._single.sort(key=_end, reverse=True)  # equal ones keep their order
        return StepPlan(self._single + self._long, self.fresh_blocks)
