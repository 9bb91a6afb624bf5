"""A data set as every method sees it: the same examples, the same split, the same batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.data.examples import parse_examples
from tessera.methods.bases import CalibrationSet
from tessera.model.base_model import BaseModel
from trainer_worker.data.training_data import VALIDATION_SHARE, TrainingData, encode_data, micro_batches
from trainer_worker.training.trainer import token_losses

#: How far an example may stand from its place by length: batches of about equal lengths, and different ones
#: for every seed.
LENGTH_JITTER = 0.3
#: More than the shares say, because duplicates fall on one side.
SPARE_EXAMPLES = 50
#: One user's own data, and how a set of so many examples is called.
PERSONAL_EXAMPLES = 50
PERSONAL_SUFFIX = f"-{PERSONAL_EXAMPLES}"


@dataclass(frozen=True)
class DataSet:
    """name: of its file. data: what is trained and validated on."""

    name: str
    data: TrainingData

    @property
    def is_personal(self) -> bool:
        return is_personal(self.name)

    def personal(self) -> DataSet:
        """What one user has: the first `PERSONAL_EXAMPLES`, and the same examples held out."""
        train, digest = self.data.train[:PERSONAL_EXAMPLES], self.data.digest + PERSONAL_SUFFIX
        return DataSet(personal_name(self.name), type(self.data)(train, self.data.valid, digest=digest))

    @cached_property
    def calibration(self) -> CalibrationSet:
        """The training examples: the user's own data."""
        return CalibrationSet.from_encoded(self.data.train)


def personal_name(name: str) -> str:
    """Of the personal part of a data set."""
    return name + PERSONAL_SUFFIX


def is_personal(name: str) -> bool:
    return name.endswith(PERSONAL_SUFFIX)


def load_data(
    path: Path, chat: ChatFormat, *, examples: int, validation: int, max_tokens: int, by_length: bool
) -> DataSet:
    """At most so many examples of the file's beginning, and `validation` held out by the examples' hashes."""
    needed = round(max(examples / (1 - VALIDATION_SHARE), validation / VALIDATION_SHARE)) + SPARE_EXAMPLES
    parsed = parse_examples(path.read_bytes())[:needed]
    encoded = encode_data(chat, parsed, max_tokens=max_tokens)
    make = LengthGroupedData if by_length else TrainingData
    assert not any(size > 1 for size in (*encoded.train_sizes, *encoded.valid_sizes)), "one row per example"
    data = make(encoded.train[:examples], encoded.valid[:validation], digest=encoded.digest)
    return DataSet(path.stem, data)


@dataclass(frozen=True)
class LengthGroupedData(TrainingData):
    """Batches of examples of about equal length, so that a small model's passes are few and full.

    Which lengths come when is the same for all seeds, so that runs that train together have like batches;
    which examples share a batch is not.
    """

    orders: dict[tuple[int, int, int], list[list[int]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def batch(self, step: int, *, batch_size: int, seed: int) -> list[EncodedExample]:
        epoch, index = divmod(step, -(-len(self.train) // batch_size))
        key = (epoch, batch_size, seed)
        if key not in self.orders:
            self.orders[key] = self._order(*key)
        return [self.train[i] for i in self.orders[key][index]]

    def _order(self, epoch: int, batch_size: int, seed: int) -> list[list[int]]:
        lengths = torch.tensor([len(example.token_ids) for example in self.train])
        own = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        place = lengths * (1 + LENGTH_JITTER * torch.rand(len(lengths), generator=own))
        ordered = place.argsort().tolist()
        batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        common = torch.Generator().manual_seed(epoch)
        return [batches[i] for i in torch.randperm(len(batches), generator=common).tolist()]


@torch.no_grad()
def mean_token_loss(base: BaseModel, examples: tuple[EncodedExample, ...], *, token_budget: int) -> float:
    """Of the model as it is, over the tokens to learn."""
    total, count = 0.0, 0
    items = [(0, example) for example in examples]
    for batch in micro_batches(items, token_budget=token_budget, min_tokens=token_budget):
        losses, _ = token_losses(base.model, batch.to(base.device))
        total += float(losses.double().sum())
        count += len(losses)
    return total / count
