"""Users for the population benchmark: personal data sets made of files of chat examples by topic.

Each file is cut into topics (balanced k-means over the tokens of the answers); some topics become newcomers, the
others are cut again into the users of the population. A file that the population never sees becomes newcomers
only: the harder case. Knows no basis and no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adapter_core.bases import CalibrationSet
from adapter_core.bases.population_users import cluster
from adapter_core.chat_format import ChatFormat, EncodedExample
from adapter_core.examples import parse_examples

MAX_TOKENS = 128


@dataclass(frozen=True)
class Newcomer:
    """A user who was not in the population. kind: "seen file" (other topics of it were) or "new file"."""

    name: str
    kind: str
    train: tuple[EncodedExample, ...]
    test: tuple[EncodedExample, ...]


@dataclass(frozen=True)
class Cast:
    """Who learns the basis, and who is measured with it."""

    population: list[CalibrationSet]
    newcomers: list[Newcomer]

    def describe(self) -> str:
        sizes = [len(user) for user in self.population]
        parts = [f"{n.name} ({n.kind}): {len(n.train)}+{len(n.test)}" for n in self.newcomers]
        return f"{len(sizes)} users of {min(sizes)} to {max(sizes)} examples; new: " + ", ".join(parts)


@dataclass(frozen=True)
class FilePlan:
    """How one file is cut. num_topics; held_out: how many of them become newcomers; num_users: of the rest."""

    path: Path
    num_topics: int
    held_out: int
    num_users: int


def read(path: Path, chat: ChatFormat) -> list[EncodedExample]:
    examples = parse_examples(path.read_bytes())
    return [chat.encode_example(example, max_tokens=MAX_TOKENS) for example in examples]


def make_cast(plans: Sequence[FilePlan], chat: ChatFormat, *, num_train: int, num_test: int, seed: int = 0) -> Cast:
    """Newcomers have at most `num_train` examples, and as many as `num_test` others to be judged by."""
    population: list[CalibrationSet] = []
    newcomers: list[Newcomer] = []
    for plan in plans:
        encoded = read(plan.path, chat)
        topics = _groups(encoded, plan.num_topics, seed)
        kind = "seen file" if plan.num_users else "new file"
        for index, topic in enumerate(topics[: plan.held_out]):
            newcomers.append(_newcomer(f"{plan.path.stem}-{index}", kind, topic, num_train, num_test, seed))
        rest = [example for topic in topics[plan.held_out :] for example in topic]
        if plan.num_users:
            population += [CalibrationSet.from_encoded(g) for g in _groups(rest, plan.num_users, seed)]
    return Cast(population, newcomers)


def _groups(encoded: Sequence[EncodedExample], number: int, seed: int) -> list[list[EncodedExample]]:
    """Groups of like examples; the order of the groups is random, so that held-out ones are not special."""
    learned = [[t for t, m in zip(e.token_ids, e.loss_mask, strict=True) if m] for e in encoded]
    groups = cluster(learned, number, seed=seed)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[encoded[i] for i in groups[index]] for index in order]


def _newcomer(
    name: str, kind: str, topic: Sequence[EncodedExample], num_train: int, num_test: int, seed: int
) -> Newcomer:
    order = torch.randperm(len(topic), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    chosen = [topic[i] for i in order]
    test = tuple(chosen[:num_test])
    return Newcomer(name, kind, tuple(chosen[num_test : num_test + num_train]), test)
