"""A population of users: given as such, or made of one set of examples.

If the calibration data do not say which user an example belongs to, groups of similar examples stand for
users. They come from balanced k-means on the unit sphere over hashed TF-IDF counts of the tokens to learn,
which is deterministic for a seed. This file knows no model.
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

#: Features of a document, and rounds of k-means.
NUM_BUCKETS = 2048
NUM_ROUNDS = 12
#: Candidates for each initial centre.
NUM_DRAWS = 8
#: `users_of` makes groups of about this size, the data of one user, and at most this many.
EXAMPLES_PER_USER = 100
MAX_USERS = 64
#: The least number of users for holding some out. In a smaller population every user is needed to teach, and
#: the loss of two users says little.
MIN_POPULATION = 8
#: Users held out, at most: as many as in one step of learning. More would cost more than they improve.
MAX_HELD_OUT = 10
#: A prime above any vocabulary, so that neighbouring token ids do not share a bucket by their order.
_HASH = 2_654_435_761


@dataclass(frozen=True)
class Population(CalibrationSet):
    """The examples of several users, one user after the other.

    Every method accepts it as one calibration set; the method `population` also uses who owns which example.
    """

    #: Number of examples of each user.
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, users: Sequence[CalibrationSet]) -> Population:
        examples = tuple(example for user in users for example in user.examples)
        return cls(examples, tuple(len(user) for user in users))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the examples and of the users' sizes, in hex."""
        return hashlib.sha256(json.dumps([super().digest, self.sizes]).encode()).hexdigest()

    @property
    def users(self) -> list[CalibrationSet]:
        """The examples of each user."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [
            CalibrationSet(self.examples[end - size : end])
            for size, end in zip(self.sizes, ends, strict=True)
        ]

    def labelled(self) -> Population:
        """Return the examples with a token to learn, without users who have none. Raises `InvalidInput`."""
        kept = super().labelled()
        if kept is self:
            return self
        parts = [[e for e in user.examples if any(e[1][1:])] for user in self.users]
        return Population(kept.examples, tuple(len(part) for part in parts if part))


def users_of(calibration: CalibrationSet, num_users: int, *, seed: int) -> list[CalibrationSet]:
    """Return the users of a population, or `num_users` groups of similar examples for plain data.

    num_users: 0 chooses it by the number of examples. Raises `InvalidInput` for fewer than two users, or for
    too few examples.
    """
    if not isinstance(calibration, Population):
        num_groups = num_users or min(MAX_USERS, max(2, len(calibration) // EXAMPLES_PER_USER))
        return split_users(calibration, num_groups, seed=seed)
    if len(calibration.sizes) < 2:
        raise InvalidInput(
            f"a population has at least 2 users, this one {len(calibration.sizes)}",
            param="calibration",
            code="calibration_too_small",
        )
    return calibration.users


def hold_out(users: Sequence[CalibrationSet], share: float, *, seed: int) -> tuple[list[CalibrationSet], ...]:
    """Return (users who teach, users held out), where a share of the users is held out, but at least two.

    Nobody is held out if there are fewer than `MIN_POPULATION` users, or fewer than two whose examples can be
    split.
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
    """Return `num_users` groups of similar examples, nearly equal in size. Raises `InvalidInput`."""
    if num_users < 2 or len(calibration) < 2 * num_users:
        raise InvalidInput(
            f"{len(calibration)} examples are too few for {num_users} users (at least 2 users of 2)",
            param="calibration",
            code="calibration_too_small",
        )
    groups = cluster(_learned_tokens(calibration), num_users, seed=seed)
    return [CalibrationSet(tuple(calibration.examples[i] for i in group)) for group in groups]


def cluster(documents: Sequence[Sequence[int]], num_clusters: int, *, seed: int = 0) -> list[list[int]]:
    """Return the indices of similar documents, in clusters of ⌊N/k⌋ or ⌈N/k⌉, each in ascending order.

    documents: token ids.
    """
    features = tf_idf(documents)
    generator = torch.Generator().manual_seed(seed)
    centres = features[_spread_out(features, num_clusters, generator)]
    for _ in range(NUM_ROUNDS):
        assigned = _balanced(features @ centres.T)
        sums = torch.zeros_like(centres).index_add_(0, assigned, features)
        centres = torch.nn.functional.normalize(sums, dim=1)
    return [(assigned == c).nonzero()[:, 0].tolist() for c in range(num_clusters)]


def tf_idf(documents: Sequence[Sequence[int]]) -> Tensor:
    """Return [N, NUM_BUCKETS] with unit rows: (1 + log count) · log(N / documents that have the bucket)."""
    counts = torch.zeros(len(documents), NUM_BUCKETS)
    for row, tokens in enumerate(documents):
        buckets = [token * _HASH % 2**32 % NUM_BUCKETS for token in tokens]
        counts[row].index_add_(0, torch.tensor(buckets), torch.ones(len(buckets)))
    idf = torch.log(len(documents) / (counts > 0).sum(0).clamp_min(1))
    weighted = torch.where(counts > 0, 1 + counts.clamp_min(1).log(), 0.0) * idf
    return torch.nn.functional.normalize(weighted, dim=1)


def _spread_out(features: Tensor, num_clusters: int, generator: torch.Generator) -> list[int]:
    """Choose initial centres by greedy k-means++.

    The probability of a document grows with its distance to the centres chosen so far. Of several draws, the
    one that is closest to all documents is taken.
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
    """Assign each row to a cluster, int64 [N], so that the clusters are nearly equal in size.

    The rows that would lose most by their second choice come first. similarity: [N, k].
    """
    N, k = similarity.shape
    free = [N // k + (c < N % k) for c in range(k)]
    best = similarity.topk(min(2, k), dim=1).values
    order = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist()
    preference = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    assigned = torch.zeros(N, dtype=torch.int64)
    for row in order:
        cluster_of_row = next(c for c in preference[row] if free[c])
        free[cluster_of_row] -= 1
        assigned[row] = cluster_of_row
    return assigned


def _learned_tokens(calibration: CalibrationSet) -> list[list[int]]:
    """Return the tokens to learn of each example, or all of its tokens if it has none."""
    return [
        [token for token, learned in zip(ids, mask, strict=True) if learned] or list(ids)
        for ids, mask in calibration.examples
    ]
