"""Users for the population benchmark: personal data made of files of chat examples, by topic.

A file is cut into topics (balanced k-means over the tokens of the answers). Some topics become newcomers,
the others are cut again, into the users of the population. A file that the population never sees becomes
newcomers only: the harder case. Knows no basis and no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.data.examples import parse_examples
from tessera.methods.bases import CalibrationSet, Population
from tessera.methods.population.users import cluster

MAX_TOKENS = 128


@dataclass(frozen=True)
class Sizes:
    """In examples: a newcomer's training and test part, and about what a user of the population has.

    held_out: the share of a seen file's topics that become newcomers.
    """

    train: int = 400
    test: int = 100
    user: int = 120
    held_out: float = 0.4

    @property
    def topic(self) -> int:
        return self.train + self.test


@dataclass(frozen=True)
class Newcomer:
    """A user who was not in the population. is_new_file: nor was any user with texts of the same file."""

    name: str
    is_new_file: bool
    train: tuple[EncodedExample, ...]
    test: tuple[EncodedExample, ...]


@dataclass(frozen=True)
class Cast:
    """Who learns the basis, and who is measured with it.

    seen: the files that the population knows. seeds: of a newcomer's trainings, by the number of examples.
    """

    name: str
    seen: Sequence[str]
    population: Population
    newcomers: list[Newcomer]
    seeds: Mapping[int, Sequence[int]]

    def describe(self) -> dict[str, object]:
        """For the report."""
        sizes = self.population.sizes
        return {
            "cast": self.name,
            "seen": list(self.seen),
            "num_users": len(sizes),
            "examples_per_user": [min(sizes), max(sizes)],
            "seeds": {str(num): list(seeds) for num, seeds in self.seeds.items()},
            "newcomers": {n.name: [len(n.train), len(n.test), n.is_new_file] for n in self.newcomers},
        }


Encoded = dict[str, list[EncodedExample]]


def read_files(paths: Sequence[Path], chat: ChatFormat) -> Encoded:
    """The encoded examples of each file, by its name without ending."""
    return {
        path.stem: [
            row
            for example in parse_examples(path.read_bytes())
            for row in chat.encode_rows(example, max_tokens=MAX_TOKENS)
        ]
        for path in paths
    }


def make_cast(
    name: str,
    files: Encoded,
    *,
    seen: Sequence[str],
    unseen: Sequence[str],
    sizes: Sizes,
    seeds: Mapping[int, Sequence[int]],
    seed: int = 0,
) -> Cast:
    """Users and newcomers of the `seen` files, and newcomers of the `unseen` ones.

    seed: of the division into topics and parts.
    """
    users: list[CalibrationSet] = []
    newcomers: list[Newcomer] = []
    for file in (*seen, *unseen):
        topics = _groups(files[file], max(1, len(files[file]) // sizes.topic), seed)
        is_new = file in unseen
        held_out = len(topics) if is_new else max(1, round(sizes.held_out * len(topics)))
        for index, topic in enumerate(topics[:held_out]):
            newcomers.append(_newcomer(f"{file}-{index}", topic, sizes, is_new_file=is_new, seed=seed))
        rest = [example for topic in topics[held_out:] for example in topic]
        if rest:
            groups = _groups(rest, max(2, len(rest) // sizes.user), seed)
            users += [CalibrationSet.from_encoded(group) for group in groups]
    return Cast(name, seen, Population.of(users), newcomers, seeds)


def _groups(encoded: Sequence[EncodedExample], number: int, seed: int) -> list[list[EncodedExample]]:
    """Groups of like examples, in random order, so that those held out are not special."""
    learned = [[t for t, m in zip(e.token_ids, e.loss_mask, strict=True) if m] for e in encoded]
    groups = cluster(learned, number, seed=seed)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[encoded[i] for i in groups[index]] for index in order]


def _newcomer(
    name: str, topic: Sequence[EncodedExample], sizes: Sizes, *, is_new_file: bool, seed: int
) -> Newcomer:
    order = torch.randperm(len(topic), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    chosen = [topic[i] for i in order]
    test = tuple(chosen[: sizes.test])
    return Newcomer(name, is_new_file, tuple(chosen[sizes.test : sizes.topic]), test)
