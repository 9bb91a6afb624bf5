"""What one step computes: the scheduler's decision, before any tensor is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The tokens start .. start + length - 1 of a sequence, whose KV is to be computed."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def is_last(self) -> bool:
        """Whether every known token is computed after this chunk."""
        return self.end == self.sequence.num_tokens

    @property
    def samples(self) -> bool:
        """Whether its last logits choose the next token."""
        return self.is_last and self.sequence.num_output < self.sequence.sampling.max_tokens

    @property
    def prompt_positions(self) -> range:
        """Positions whose logits are scored against the next prompt token."""
        if not self.sequence.needs_prompt_logprobs:
            return range(0)
        return range(self.start, min(self.end, self.sequence.num_prompt - 1))


@dataclass
class StepPlan:
    """chunks: those of one token first, longest context first, then the others. fresh_blocks: KV blocks that
    were another's before, to be cleared."""

    chunks: list[Chunk] = field(default_factory=list)
    fresh_blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_distinct(self) -> int:
        """Different models in the step: adapter versions, and the base model if it is among them."""
        return len({chunk.sequence.adapter for chunk in self.chunks})
