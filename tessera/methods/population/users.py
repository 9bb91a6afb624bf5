"""A population of users, given as such or made of one pile of examples.

Where calibration data do not say whose they are, groups of like examples take the part of users: balanced
k-means on the unit sphere over hashed TF-IDF counts of the tokens to learn, deterministic by its seed.
Knows no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.building.calibration import CalibrationSet

NUM_BUCKETS = 2048
NUM_ROUNDS = 12
#: Candidates for each first centre.
NUM_DRAWS = 8
#: What `split_users` aims at: about the data of one user; and how many users it makes at most.
EXAMPLES_PER_USER = 100
MAX_USERS = 64
#: In a smaller population every user is needed to teach, and two who are held out say little.
MIN_POPULATION = 8
#: As many as there are in one step of learning; more would not decide better by what they cost.
MAX_HELD_OUT = 10
#: A prime above any vocabulary, so that neighbouring token ids do not share a bucket by their order.
_HASH = 2_654_435_761


@dataclass(frozen=True)
class Population(CalibrationSet):
    """The examples of several users, one user's after another's; sizes: how many each has.

    Any method takes it as one calibration set; `population` knows the users apart.
    """

    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, users: Sequence[CalibrationSet]) -> Population:
        examples = tuple(example for user in users for example in user.examples)
        return cls(examples, tuple(len(user) for user in users))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the examples and whose they are, as hex."""
        return hashlib.sha256(json.dumps([super().digest, self.sizes]).encode()).hexdigest()

    @property
    def users(self) -> list[CalibrationSet]:
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [
            CalibrationSet(self.examples[end - size : end])
            for size, end in zip(self.sizes, ends, strict=True)
        ]

    def labelled(self) -> Population:
        """The examples that have a token to learn, of the users that have one. Raises `InvalidInput`."""
        kept = super().labelled()
        if kept is self:
            return self
        parts = [[e for e in user.examples if any(e[1][1:])] for user in self.users]
        return Population(kept.examples, tuple(len(part) for part in parts if part))


def users_of(calibration: CalibrationSet, num_users: int, *, seed: int) -> list[CalibrationSet]:
    """The users of a population, or, of plain data, so many groups of like examples (0: by their number).

    Raises `InvalidInput` for fewer than two users, or for too few examples.
    """
    if not isinstance(calibration, Population):
        wanted = num_users or min(MAX_USERS, max(2, len(calibration) // EXAMPLES_PER_USER))
        return split_users(calibration, wanted, seed=seed)
    if len(calibration.sizes) < 2:
        raise InvalidInput(
            f"a population has at least 2 users, this one {len(calibration.sizes)}",
            param="calibration",
            code="calibration_too_small",
        )
    return calibration.users


def hold_out(users: Sequence[CalibrationSet], share: float, *, seed: int) -> tuple[list[CalibrationSet], ...]:
    """(users who teach, users held out): of `MIN_POPULATION` users on a share of them, at least two.

    Nobody is held out where the population is smaller, or has no two users whose examples can be divided.
    """
    able = [index for index, user in enumerate(users) if len(user) >= 2]
    if not share or len(users) < MIN_POPULATION or len(able) < 2:
        return list(users), []
    num = min(max(2, round(share * len(users))), MAX_HELD_OUT, len(able))
    order = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {able[i] for i in order[:num]}
    return (
        [user for index, user in enumerate(users) if index not in chosen],
        [user for index, user in enumerate(users) if index in chosen],
    )


def split_users(calibration: CalibrationSet, num_users: int, *, seed: int = 0) -> list[CalibrationSet]:
    """`num_users` groups of like examples, nearly equal in size. Raises `InvalidInput` for too few."""
    if num_users < 2 or len(calibration) < 2 * num_users:
        raise InvalidInput(
            f"{len(calibration)} examples are too few for {num_users} users (at least 2 users of 2)",
            param="calibration",
            code="calibration_too_small",
        )
    groups = cluster(_learned_tokens(calibration), num_users, seed=seed)
    return [CalibrationSet(tuple(calibration.examples[i] for i in group)) for group in groups]


def cluster(documents: Sequence[Sequence[int]], num_clusters: int, *, seed: int = 0) -> list[list[int]]:
    """Indices of like documents (token ids), in clusters of ⌊N/k⌋ or ⌈N/k⌉, each in ascending order."""
    features = tf_idf(documents)
    generator = torch.Generator().manual_seed(seed)
    centres = features[_spread_out(features, num_clusters, generator)]
    for _ in range(NUM_ROUNDS):
        assigned = _balanced(features @ centres.T)
        sums = torch.zeros_like(centres).index_add_(0, assigned, features)
        centres = torch.nn.functional.normalize(sums, dim=1)
    return [(assigned == c).nonzero()[:, 0].tolist() for c in range(num_clusters)]


def tf_idf(documents: Sequence[Sequence[int]]) -> Tensor:
    """[N, NUM_BUCKETS] unit rows: (1 + log count) · log(N / documents with the bucket)."""
    counts = torch.zeros(len(documents), NUM_BUCKETS)
    for row, tokens in enumerate(documents):
        buckets = [token * _HASH % 2**32 % NUM_BUCKETS for token in tokens]
        counts[row].index_add_(0, torch.tensor(buckets), torch.ones(len(buckets)))
    idf = torch.log(len(documents) / (counts > 0).sum(0).clamp_min(1))
    weighted = torch.where(counts > 0, 1 + counts.clamp_min(1).log(), 0.0) * idf
    return torch.nn.functional.normalize(weighted, dim=1)


def _spread_out(features: Tensor, num_clusters: int, generator: torch.Generator) -> list[int]:
    """k-means++: each next centre is drawn with a chance that grows with its distance to those chosen.

    Of several draws the one that comes closest to all is taken (the greedy variant).
    """
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    nearest = features @ features[chosen[0]]
    while len(chosen) < num_clusters:
        chance = (1 - nearest).clamp_min(0) ** 2 + 1e-9
        drawn = torch.multinomial(chance, min(NUM_DRAWS, len(features)), generator=generator)
        closer = torch.maximum(nearest[:, None], features @ features[drawn].T)  # [N, draws]
        best = int(closer.sum(0).argmax())
        chosen.append(int(drawn[best]))
        nearest = closer[:, best]
    return chosen


def _balanced(similarity: Tensor) -> Tensor:
    """int64 [N]: each row's cluster, the rows that lose most by a second choice first, all clusters full.

    similarity: [N, k].
    """
    N, k = similarity.shape
    room = [N // k + (c < N % k) for c in range(k)]
    best = similarity.topk(min(2, k), dim=1).values
    order = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist()
    preference = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    assigned = torch.zeros(N, dtype=torch.int64)
    for row in order:
        cluster_of_row = next(c for c in preference[row] if room[c])
        room[cluster_of_row] -= 1
        assigned[row] = cluster_of_row
    return assigned


def _learned_tokens(calibration: CalibrationSet) -> list[list[int]]:
    return [
        [token for token, learned in zip(ids, mask, strict=True) if learned] or list(ids)
        for ids, mask in calibration.examples
    ]
