"""From examples to batches: encoding, the validation split, the order of an epoch, padded rows.

Every row holds one sequence, never the sequences of two users: transformers lets packed sequences attend to
each other when a mask is passed, and then one user's loss would train another's adapter. Knows no model and
no optimizer.

An example is one line of a file and has one row or several (`tessera/chat/rows.py`). Examples are split,
shuffled and put into batches with all their rows, so the chat template does not change the schedule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, islice

import torch
from torch import Tensor

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.data.examples import Example, for_each
from tessera.data.statistics import DataStatistics
from trainer_worker.data.splits import Answer, answer_of, group_examples, hold_back

#: With fewer examples, all are used for training, because a validation split would cost more than it
#: could show.
MIN_EXAMPLES_TO_SPLIT = 10
VALIDATION_SHARE = 0.1
#: Of few examples a larger share is held back, up to this many: two or three would show nothing.
FEW_SHARE, MIN_VALIDATION = 0.2, 8
#: Enough to detect a difference of 0.02 nats; more would only slow the evaluations.
MAX_VALIDATION = 200

#: A row shorter than this fraction of the longest row in its micro-batch starts the next micro-batch.
#: Measured with the bundled model on one core, 8 examples of jargon and 8 of devil: 0.81 / 0.74 / 0.70 / 0.64
#: / 0.55 / 0.56 s per step at 0 / 0.4 / 0.5 / 0.6 / 0.7 / 0.8.
MIN_FILL = 0.7
#: On a GPU a micro-batch smaller than this is not split: an 8B model does not fill an H100 below 2,000 tokens
#: (9.9 k tokens/s at 512, 12.9 k at 2 k, 13.7 k at 8 k), so padding costs less than a second pass.
GPU_MIN_TOKENS = 2048


#: The rows of one example.
Rows = Sequence[EncodedExample]


@dataclass(frozen=True)
class TrainingData:
    """The data of a job for training and validation, as rows in the order of their examples."""

    train: tuple[EncodedExample, ...]
    valid: tuple[EncodedExample, ...]
    #: SHA-256 over the tokens and masks of both parts.
    digest: str
    #: Examples that were too long.
    num_truncated: int = 0
    #: Examples that are in the training file and in the validation file.
    num_overlapping: int = 0
    #: The number of rows of each example; empty if every example has one row.
    train_sizes: tuple[int, ...] = ()
    valid_sizes: tuple[int, ...] = ()
    #: Of pairs of answers: how many rows of each example, the first ones, belong to the preferred answer;
    #: empty if the examples are not pairs.
    train_chosen: tuple[int, ...] = ()
    valid_chosen: tuple[int, ...] = ()
    #: The group of each training example, then of each validation example if these were split off: a search
    #: for a learning rate may split them again. Empty if the owner has chosen the validation examples.
    groups: tuple[str, ...] = ()
    #: Longer examples were truncated to this many tokens; None if nobody knows.
    max_tokens: int | None = None
    #: Counts over the training file; None if nobody has counted.
    statistics: DataStatistics | None = None

    @cached_property
    def num_train_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.train)

    @property
    def answers(self) -> tuple[EncodedExample, ...]:
        """The training rows that a model should imitate: of pairs those of the preferred answers."""
        if not self.train_chosen:
            return self.train
        parts = zip(self.train_examples, self.train_chosen, strict=True)
        return tuple(row for rows, num_chosen in parts for row in rows[:num_chosen])

    @property
    def num_train(self) -> int:
        """Number of training examples."""
        return len(self.train_sizes) or len(self.train)

    @property
    def num_valid(self) -> int:
        """Number of validation examples."""
        return len(self.valid_sizes) or len(self.valid)

    @cached_property
    def train_examples(self) -> list[tuple[EncodedExample, ...]]:
        """The rows of each training example."""
        rows = iter(self.train)
        return [tuple(islice(rows, size)) for size in self.train_sizes or (1,) * len(self.train)]

    @cached_property
    def valid_examples(self) -> list[tuple[EncodedExample, ...]]:
        """The rows of each validation example."""
        rows = iter(self.valid)
        return [tuple(islice(rows, size)) for size in self.valid_sizes or (1,) * len(self.valid)]

    def pooled(self) -> TrainingData:
        """Return the data with the examples that were split off for validation among the others."""
        return replace(
            self,
            train=self.train + self.valid,
            train_sizes=tuple(map(len, (*self.train_examples, *self.valid_examples))),
            valid=(),
            valid_sizes=(),
        )

    def select(self, *, train: Sequence[int], valid: Sequence[int]) -> TrainingData:
        """Return data with these of the training examples, to train and to validate."""
        rows = [[self.train_examples[index] for index in part] for part in (train, valid)]
        return replace(
            self,
            train=tuple(chain.from_iterable(rows[0])),
            valid=tuple(chain.from_iterable(rows[1])),
            train_sizes=tuple(map(len, rows[0])),
            valid_sizes=tuple(map(len, rows[1])),
            groups=(),
        )

    def batch_indices(self, step: int, *, batch_size: int, seed: int) -> list[int]:
        """Return which training examples are in this step. The seed gives each epoch its own order."""
        steps_per_epoch = -(-self.num_train // batch_size)
        epoch, index = divmod(step, steps_per_epoch)
        order = _order(self.num_train, (seed * 1_000_003 + epoch) % 2**63)
        return order[index * batch_size : (index + 1) * batch_size].tolist()

    def batch(self, step: int, *, batch_size: int, seed: int) -> list[EncodedExample]:
        """Return the rows of the training examples in this step."""
        indices = self.batch_indices(step, batch_size=batch_size, seed=seed)
        return [row for i in indices for row in self.train_examples[i]]


@lru_cache(maxsize=64)
def _order(num_examples: int, seed: int) -> Tensor:
    """Return the order of an epoch. 200,000 examples: 5 ms, which not every step should take."""
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))


def encode_data(
    chat: ChatFormat,
    examples: Iterable[Example],
    *,
    max_tokens: int,
    validation: Iterable[Example] | None = None,
    share: float | None = None,
) -> TrainingData:
    """Encode a training file, and split off validation examples unless there is a validation file.

    share: of the examples, to be split off; 0: none; None: decided by their number.

    The split follows from the contents of the examples, so the same file gives the same split, and examples
    with the same answer stay on one side where answers are texts (`splits.py`). Raises `InvalidTrainingData`
    with every line that the chat template refuses or that has no token to learn.
    """
    encoded: list[Rows] = [*_encode(chat, examples, max_tokens, param="training_file")]
    digests = [_example_digest(example) for example in examples]
    train: list[Rows]
    valid: list[Rows]
    groups: list[str] = []
    overlap = 0
    if validation is not None:
        train, valid = encoded, [*_encode(chat, validation, max_tokens, param="validation_file")]
        overlap = len(set(digests) & {_example_digest(example) for example in validation})
    else:
        train, valid, groups = _split(encoded, digests, share)
    return TrainingData(
        tuple(chain.from_iterable(train)),
        tuple(chain.from_iterable(valid)),
        digest=data_digest(train, valid),
        num_truncated=sum(any(row.truncated for row in rows) for rows in (*train, *valid)),
        num_overlapping=overlap,
        train_sizes=tuple(map(len, train)),
        valid_sizes=tuple(map(len, valid)),
        groups=() if share is not None else tuple(groups),
        max_tokens=max_tokens,
    )


def _split(
    encoded: Sequence[Rows], digests: Sequence[str], share: float | None
) -> tuple[list[Rows], list[Rows], list[str]]:
    """Return the examples to train on, those to hold back, and the groups of both."""
    names = group_examples([_answer(rows) for rows in encoded], digests)
    chosen = hold_back(names, num_held_back(len(encoded), share))
    train = [index for index, name in enumerate(names) if name not in chosen]
    valid = [index for index, name in enumerate(names) if name in chosen]
    return (
        [encoded[index] for index in train],
        [encoded[index] for index in valid],
        [names[index] for index in (*train, *valid)],
    )


def num_held_back(num_examples: int, share: float | None) -> int:
    """Return about how many examples are held back for validation.

    share: what the job asks for, of which at least one example is held back and one is left to train on; 0:
    none; None: decided by their number.
    """
    if share is not None:
        return min(max(1, round(share * num_examples)), num_examples - 1) if share else 0
    if num_examples < MIN_EXAMPLES_TO_SPLIT:
        return 0
    few = min(MIN_VALIDATION, round(FEW_SHARE * num_examples))
    return min(max(few, round(VALIDATION_SHARE * num_examples)), MAX_VALIDATION)


def _answer(rows: Rows) -> Answer:
    """Return the tokens to learn of an example."""
    return answer_of(
        token
        for row in rows
        for token, is_learned in zip(row.token_ids, row.loss_mask, strict=True)
        if is_learned
    )


def _encode(
    chat: ChatFormat, examples: Iterable[Example], max_tokens: int, *, param: str
) -> list[list[EncodedExample]]:
    """Return the rows of each example."""

    def encode(example: Example) -> list[EncodedExample]:
        return [row.packed() for row in chat.encode_rows(example, max_tokens=max_tokens)]

    return for_each(examples, encode, param=param)


def validation_digests(digests: Sequence[str], share: float | None) -> set[str]:
    distinct = sorted(set(digests))
    return set(distinct[: num_held_back(len(distinct), share)])


def _example_digest(example: Example) -> str:
    fields = {key: value for key, value in asdict(example).items() if key not in ("user", "line")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def data_digest(*parts: Sequence[Sequence[EncodedExample]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for rows in part:
            digest.update(json.dumps([row.as_json() for row in rows]).encode())
        digest.update(b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class MicroBatch:
    """Rows of any users that go through the model at once, padded on the right.

    It needs no mask: under causal attention no real token sees the padding to its right.
    """

    #: int64 [S, L].
    token_ids: Tensor
    #: int64 [S], the owner of each row.
    rows: Tensor
    #: int64 [N], for each of the N tokens to learn: where in the flattened [S · L] the token *before* it is.
    positions: Tensor
    #: int64 [N], the tokens to learn.
    targets: Tensor
    #: int64 [N], their owners.
    owners: Tensor
    #: The tokens of each row without padding, [S].
    lengths: tuple[int, ...]
    #: int64 [S], on the CPU: which of the items that were given to `micro_batches` each row is.
    items: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)

    @property
    def num_padding(self) -> int:
        return self.token_ids.numel() - self.num_tokens

    def to(self, device: torch.device) -> MicroBatch:
        """Return the batch with its tensors on `device`."""
        return MicroBatch(
            self.token_ids.to(device),
            self.rows.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.owners.to(device),
            self.lengths,
            self.items,
        )


def micro_batches(
    items: Sequence[tuple[int, EncodedExample]],
    *,
    token_budget: int,
    sizes: Sequence[int] | None = None,
    min_tokens: int = 0,
    min_fill: float = MIN_FILL,
) -> Iterator[MicroBatch]:
    """Group (owner, example) items into micro-batches of similar lengths, by falling length.

    A micro-batch has at most `token_budget` tokens with padding. While it has fewer than `min_tokens`, it
    also takes rows that are much shorter than its longest. sizes: how many successive items form a set that
    is never divided, such as the two rows of a pair; None: every item goes by itself. A single set larger
    than the budget goes alone.
    """
    indices = iter(range(len(items)))
    sets = [tuple(islice(indices, size)) for size in sizes or (1,) * len(items)]
    lengths = [max(len(items[index][1].token_ids) for index in members) for members in sets]
    group: list[int] = []
    longest = 0
    for number in sorted(range(len(sets)), key=lambda number: -lengths[number]):
        members, length = sets[number], lengths[number]
        size = len(group) * longest
        is_misfit = length < min_fill * longest and size >= min_tokens
        if group and (size + len(members) * longest > token_budget or is_misfit):
            yield _pad(items, group)
            group = []
        longest = longest if group else length
        group += members
    if group:
        yield _pad(items, group)


def _pad(items: Sequence[tuple[int, EncodedExample]], indices: Sequence[int]) -> MicroBatch:
    group = [items[index] for index in indices]
    longest = max(len(example.token_ids) for _, example in group)
    token_ids = torch.zeros(len(group), longest, dtype=torch.int64)
    positions, targets, owners = [], [], []
    for row, (owner, example) in enumerate(group):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        learned = [i for i, is_learned in enumerate(example.loss_mask) if is_learned]
        positions += [row * longest + i - 1 for i in learned]
        targets += [example.token_ids[i] for i in learned]
        owners += [owner] * len(learned)
    return MicroBatch(
        token_ids,
        torch.tensor([owner for owner, _ in group]),
        torch.tensor(positions),
        torch.tensor(targets),
        torch.tensor(owners),
        lengths=tuple(len(example.token_ids) for _, example in group),
        items=torch.tensor(indices),
    )
