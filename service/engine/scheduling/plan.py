"""What one step computes: the scheduler's decision, before any tensor is made of it."""

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
    """The tokens start .. end - 1 of a request, whose KV is to be computed; length: their number.

    What follows from the request as it is when the chunk is made, for it changes before the results are in:
    is_last: every known token is computed after this chunk. is_pending: the last of its tokens is sampled but
    not known yet. samples: its last logits choose the next token. is_plain: they do no more than that, by
    their largest. prompt_positions: positions whose logits are scored against the next prompt token.
    """

    # One per request and step. A dataclass with these fields takes twice as long to make, a frozen one five
    # times.
    __slots__ = (
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
        self.is_last = is_last
        self.is_pending = is_last and token_ids[-1] == PENDING
        self.samples = samples
        self.is_plain = samples and request.is_plain
        self.prompt_positions = _NOTHING
        if request.needs_prompt_logprobs:
            self.prompt_positions = range(start, min(end, request.num_prompt - 1))


@dataclass
class StepPlan:
    """chunks: those of one token first, longest context first, then the others; they stay as they are.
    fresh_blocks: KV blocks that were another's before, to be cleared."""

    chunks: list[Chunk] = field(default_factory=list)
    fresh_blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum([chunk.length for chunk in self.chunks])

    @cached_property
    def is_plain(self) -> bool:
        """Whether every chunk only samples, and the largest logit at that: the usual step, and the one that
        is to take the least time."""
        return all(map(_is_plain, self.chunks))

    @cached_property
    def is_decode(self) -> bool:
        """Whether every chunk is one token that samples, and scores nothing."""
        has_long = bool(self.chunks) and self.chunks[-1].length > 1
        return not has_long and (
            self.is_plain or all(c.samples and not c.prompt_positions for c in self.chunks)
        )

    @cached_property
    def basis_ids(self) -> set[str | None]:
        """Whose adapters are in the step; None for the base model alone."""
        return {chunk.request.basis_id for chunk in self.chunks}

    @cached_property
    def num_distinct(self) -> int:
        """Different models in the step: adapter versions, and the base model if it is among them."""
        return len({chunk.request.model_name for chunk in self.chunks})


class StepBuilder:
    """A plan that grows within the limits of one step."""

    def __init__(self, max_tokens: int, max_logit_rows: int) -> None:
        self.num_tokens_left = max_tokens
        self.fresh_blocks: list[int] = []
        self._num_logit_rows_left = max_logit_rows
        self._single: list[Chunk] = []
        self._long: list[Chunk] = []

    def add_decodes(self, requests: Sequence[EngineRequest]) -> None:
        """The one token that each of them has to compute: it scores nothing, its prompt being over."""
        self._single += [Chunk(request, request.num_computed, 1) for request in requests]
        self.num_tokens_left -= len(requests)

    def add_prefill(self, request: EngineRequest, *, is_alone: bool) -> None:
        """As many tokens as are left; half of them if others could use some, so that a long prompt does not
        hold up short ones that come after it."""
        share = self.num_tokens_left if is_alone else -(-self.num_tokens_left // 2)
        if request.needs_prompt_logprobs:  # one row of logits per token
            share = min(share, max(1, self._num_logit_rows_left))
        chunk = Chunk(request, request.num_computed, min(request.num_uncomputed, share))
        (self._single if chunk.length == 1 else self._long).append(chunk)
        self.num_tokens_left -= chunk.length
        self._num_logit_rows_left -= len(chunk.prompt_positions)

    def finish(self) -> StepPlan:
        assert self.num_tokens_left >= 0
        self._single.sort(key=_end, reverse=True)  # equal ones keep their order
        return StepPlan(self._single + self._long, self.fresh_blocks)
