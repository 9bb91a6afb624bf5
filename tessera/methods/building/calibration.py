"""Calibration data: token ids with a mask of the tokens to learn; how they are drawn, hashed and batched.

A method needs either text (token ids) or labels (a mask that marks tokens to learn). This file knows no
model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessera.errors import InvalidInput

if TYPE_CHECKING:
    from tessera.chat.chat_format import EncodedExample

#: Tokens in one pass, padding included. This fills the matrix units of an 8B model; at a width of 4096, the
#: inputs that are kept until their gradient arrives take 33 MB per module.
MAX_BATCH_TOKENS = 2048
#: An example that is shorter than this share of the longest one in its batch goes into the next batch.
MIN_FILL = 0.5


@dataclass(frozen=True)
class CalibrationSet:
    """The examples that a method reads.

    Raises `InvalidInput` if there is no example, or if one has no tokens or a mask of another length.
    """

    #: Pairs (token ids [T], loss mask [T]); the first entry of a mask does not count.
    examples: tuple[tuple[Sequence[int], Sequence[int]], ...]

    def __post_init__(self) -> None:
        if not self.examples:
            raise InvalidInput("the calibration set is empty", param="calibration", code="empty_calibration")
        for index, (token_ids, mask) in enumerate(self.examples):
            if not token_ids or len(token_ids) != len(mask):
                raise InvalidInput(
                    f"calibration example {index} has {len(token_ids)} tokens and a mask of {len(mask)}",
                    param="calibration",
                )

    @classmethod
    def from_encoded(cls, examples: Iterable[EncodedExample]) -> CalibrationSet:
        """Make a labelled set; the mask marks the tokens that training would learn."""
        return cls(tuple((item.token_ids, item.loss_mask) for item in examples))

    @classmethod
    def from_texts(cls, texts: Iterable[Sequence[int]]) -> CalibrationSet:
        """Make an unlabelled set, for methods that read only activations."""
        return cls(tuple((tuple(ids), (False,) * len(ids)) for ids in texts))

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens and masks, in hex."""
        digest = hashlib.sha256()
        for index, (ids, mask) in enumerate(self.examples):  # in pieces, but as JSON of the whole list
            text = json.dumps([list(ids), list(map(bool, mask))])
            digest.update(f"{', ' if index else '['}{text}".encode())
        digest.update(b"]")
        return digest.hexdigest()

    @cached_property
    def num_tokens(self) -> int:
        return sum(len(token_ids) for token_ids, _ in self.examples)

    @cached_property
    def num_label_tokens(self) -> int:
        return sum(sum(mask[1:]) for _, mask in self.examples)

    @cached_property
    def max_batch_tokens(self) -> int:
        """Tokens of the largest batch, padding included."""
        return max(batch.token_ids.numel() for batch in self.batches())

    def take(self, num_examples: int, *, seed: int, min_label_tokens: int = 0) -> CalibrationSet:
        """Draw examples at random until there are `num_examples` of them with `min_label_tokens`.

        Returns the whole set if it has fewer. The papers count examples, but tokens decide the quality of a
        gradient, so the floor counts tokens.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen: list[int] = []
        label_tokens = 0
        for index in order:
            if len(chosen) >= num_examples and label_tokens >= min_label_tokens:
                break
            chosen.append(index)
            label_tokens += sum(self.examples[index][1][1:])
        if len(chosen) == len(self):
            return self
        return CalibrationSet(tuple(self.examples[index] for index in sorted(chosen)))

    def labelled(self) -> CalibrationSet:
        """Return the examples that have a token to learn. Raises `InvalidInput` if none has."""
        kept = tuple(example for example in self.examples if any(example[1][1:]))
        if not kept:
            raise InvalidInput(
                "no calibration example has a token to learn: this method needs labelled examples",
                param="calibration",
                code="unlabelled_calibration",
            )
        return self if len(kept) == len(self) else CalibrationSet(kept)

    def batches(
        self, *, max_tokens: int = MAX_BATCH_TOKENS, min_fill: float = MIN_FILL
    ) -> Iterator[CalibrationBatch]:
        """Yield all examples in batches of similar lengths, padded on the right.

        An example of more than `max_tokens` is a batch of its own. The batches come in a fixed random order,
        because an online rule must not see all short examples last.
        """
        groups: list[list[int]] = []
        for index in sorted(range(len(self)), key=lambda index: (-len(self.examples[index][0]), index)):
            length = len(self.examples[index][0])
            longest = len(self.examples[groups[-1][0]][0]) if groups else 0
            fits = groups and (len(groups[-1]) + 1) * longest <= max_tokens and length >= min_fill * longest
            if fits:
                groups[-1].append(index)
            else:
                groups.append([index])
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
        for position in order:
            yield self._batch(groups[position])

    def _batch(self, rows: Sequence[int]) -> CalibrationBatch:
        longest = len(self.examples[rows[0]][0])
        token_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, index in enumerate(rows):
            ids, mask = self.examples[index]
            token_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, 1 : len(ids)] = torch.tensor(list(mask[1:]), dtype=torch.bool)
        lengths = tuple(len(self.examples[index][0]) for index in rows)
        return CalibrationBatch(token_ids, labels, lengths, tuple(rows))


@dataclass(frozen=True)
class CalibrationBatch:
    """The rows of one forward pass."""

    #: int64 [S, L], padded on the right. With causal attention no real token sees the padding, so no mask is
    #: needed.
    token_ids: Tensor
    #: bool [S, L]: the tokens to learn.
    labels: Tensor
    #: The number of tokens of each row.
    lengths: tuple[int, ...]
    #: The index of each row's example in the calibration set.
    indices: tuple[int, ...]

    @property
    def valid(self) -> Tensor:
        """bool [S, L]: the tokens that are not padding."""
        positions = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        return positions < torch.tensor(self.lengths, device=self.token_ids.device)[:, None]

    @property
    def label_counts(self) -> Tensor:
        """float32 [S]: the number of tokens to learn in each row."""
        return self.labels.sum(1).float()

    def to(self, device: torch.device) -> CalibrationBatch:
        return CalibrationBatch(self.token_ids.to(device), self.labels.to(device), self.lengths, self.indices)
