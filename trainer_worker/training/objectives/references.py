"""The log-probabilities of a run's pairs under its reference: computed once, before the first step.

The reference is the state that the job was told to begin with: the base model, or the adapter from which
training continues. They are computed a few pairs at a time, so that the runs beside it go on, and are a part
of the checkpoint, because later that state is gone. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.objectives.objective import Sample

#: A pass without a gradient takes about a third of the time of one with it, so this makes a step that
#: computes the reference as long as a training step of the same run.
TOKENS_PER_TRAINED_TOKEN = 3


class References:
    """The log-probabilities of the training pairs, then of the validation pairs, as far as they are known."""

    def __init__(self, data: TrainingData) -> None:
        self._examples = [*data.train_examples, *data.valid_examples]
        self._chosen = [*data.train_chosen, *data.valid_chosen]
        #: Of the first n pairs, for the preferred answers and the others: float64 [n, 2], on the CPU.
        self.logps = torch.zeros(0, 2, dtype=torch.float64)

    @property
    def num_pairs(self) -> int:
        return len(self._examples)

    @property
    def progress(self) -> tuple[int, int]:
        """The number of finished pairs, and of all."""
        return len(self.logps), self.num_pairs

    @property
    def is_complete(self) -> bool:
        return len(self.logps) >= self.num_pairs

    def of(self, pair: int) -> tuple[float, float]:
        """Return the log-probabilities of a finished pair."""
        chosen, rejected = self.logps[pair].tolist()
        return chosen, rejected

    def next_samples(self, max_tokens: int) -> list[Sample]:
        """Return the next pairs to compute: at most max_tokens, but at least one pair."""
        samples: list[Sample] = []
        num_tokens = 0
        for pair in range(len(self.logps), self.num_pairs):
            sample = Sample(self._examples[pair], self._chosen[pair])
            num_tokens += sample.num_tokens
            if samples and num_tokens > max_tokens:
                break
            samples.append(sample)
        return samples

    def add(self, logps: Tensor) -> None:
        """Take the log-probabilities of the pairs that `next_samples` returned, [pairs, 2]."""
        self.logps = torch.cat([self.logps, logps])

    def restore(self, logps: Tensor) -> None:
        """Take those of a checkpoint. Raises `ValueError` if they are of other data."""
        if logps.dtype != torch.float64 or logps.shape[1:] != (2,) or len(logps) > self.num_pairs:
            raise ValueError("log-probabilities of the reference of another shape")
        self.logps = logps
