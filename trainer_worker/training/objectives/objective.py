"""The interface of an objective, and the one that most jobs have: the mean loss of the tokens to learn.

An objective belongs to a run. Runs with different objectives share the passes through the model (`tally.py`).
Knows no model and no optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tessera.chat.chat_format import EncodedExample


@dataclass(frozen=True)
class Sample:
    """One example of a run, as a step or an evaluation takes it."""

    rows: tuple[EncodedExample, ...]
    #: Of a pair: how many of the rows, the first ones, belong to the preferred answer; the others to the
    #: answer that was not preferred. 0 for an example that is not a pair.
    num_chosen: int = 0
    #: Of a pair: the log-probabilities of the preferred answer and of the other one under the reference.
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True)
class Measured:
    """The means of one run over the samples of a step or of an evaluation."""

    #: What the run minimises: nats per token, or the loss per pair.
    loss: float
    #: The share of tokens that were the most likely ones, or of pairs in which the preferred answer gained
    #: more than the other one.
    accuracy: float
    #: The share of answers of which every token was the most likely one, so that greedy decoding would give
    #: exactly this answer; None for pairs.
    exact: float | None = None
    #: What the objective measures besides, by name.
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgedPairs:
    """The losses of P pairs."""

    #: [P].
    loss: Tensor
    #: d loss / d log p of the preferred answers and of the others, [2, P].
    slope: Tensor
    #: [P], 1 where the preferred answer gained more than the other one, otherwise 0.
    is_correct: Tensor
    #: Further values by name, each [P].
    details: dict[str, Tensor]


class Objective(Protocol):
    """What a run minimises."""

    @property
    def is_preference(self) -> bool:
        """Whether samples are pairs, which `judge` compares. Otherwise the loss is the mean over tokens."""

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probabilities of the state that training begins with are needed."""

    def judge(self, logps: Tensor, reference: Tensor, lengths: Tensor) -> JudgedPairs:
        """Return the losses of P pairs.

        logps, reference: log-probabilities of the preferred answers and of the others, [2, P], float64.
        lengths: their numbers of learned tokens, [2, P].
        """

    def event_values(self, measured: Measured, *, is_held_out: bool) -> dict[str, float]:
        """Return what a metrics event shows besides the loss, by OpenAI's or TRL's names."""


@dataclass(frozen=True)
class Supervised:
    """The mean of -log p over all tokens to learn of a batch."""

    is_preference = False
    needs_reference = False

    def judge(self, logps: Tensor, reference: Tensor, lengths: Tensor) -> JudgedPairs:
        raise AssertionError("supervised samples are not pairs")

    def event_values(self, measured: Measured, *, is_held_out: bool) -> dict[str, float]:
        name = "valid_mean_token_accuracy" if is_held_out else "train_mean_token_accuracy"
        return {name: measured.accuracy}


#: The objective of every run that has no other.
SUPERVISED = Supervised()


def num_tokens(samples: Sequence[Sample]) -> int:
    """Return the number of tokens of all rows."""
    return sum(sample.num_tokens for sample in samples)
