"""What one step computes: the scheduler's decision, before any tensor is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.sequence import Sequence

_NOTHING = range(0)


@dataclass(eq=False, slots=True)  # one per sequence and step: not frozen, which takes five times as long
class Chunk:
    """The tokens start .. start + length - 1 of a sequence, whose KV is to be computed.

    What follows from the sequence as it is when the chunk is made, for it changes before the results are in:
    is_last: every known token is computed after this chunk. samples: its last logits choose the next token.
    prompt_positions: positions whose logits are scored against the next prompt token.
    """

    sequence: Sequence
    start: int
    length: int
    is_last: bool = field(init=False)
    samples: bool = field(init=False)
    prompt_positions: range = field(init=False)

    def __post_init__(self) -> None:
        sequence = self.sequence
        self.is_last = self.end == sequence.num_tokens
        self.samples = self.is_last and sequence.num_output < sequence.sampling.max_tokens
        self.prompt_positions = _NOTHING
        if sequence.needs_prompt_logprobs:
            self.prompt_positions = range(self.start, min(self.end, sequence.num_prompt - 1))

    @property
    def end(self) -> int:
        return self.start + self.length


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
