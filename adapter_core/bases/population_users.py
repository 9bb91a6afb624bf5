"""A population of users made of one pile of examples: groups of like examples take the part of users.

For calibration data that do not say whose they are. Balanced k-means on the unit sphere over hashed TF-IDF counts of
the tokens to learn; deterministic by its seed. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapter_core.bases.calibration import CalibrationSet
from adapter_core.errors import InvalidInput

NUM_BUCKETS = 2048
NUM_ROUNDS = 12
#: A prime above any vocabulary, so that neighbouring token ids do not share a bucket by their order.
_HASH = 2_654_435_761


def split_users(calibration: CalibrationSet, num_users: int, *, seed: int = 0) -> list[CalibrationSet]:
    """`num_users` groups of like examples, of nearly equal size. Raises `InvalidInput` for too few examples."""
    if len(calibration) < 2 * num_users:
        raise InvalidInput(
            f"{len(calibration)} examples are too few for {num_users} users of at least 2",
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
    """k-means++: each next centre is drawn with a chance that grows with its distance to those chosen."""
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    nearest = features @ features[chosen[0]]
    while len(chosen) < num_clusters:
        chance = (1 - nearest).clamp_min(0) ** 2 + 1e-9
        chosen.append(int(torch.multinomial(chance, 1, generator=generator)))
        nearest = torch.maximum(nearest, features @ features[chosen[-1]])
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
        [token for token, learned in zip(ids, mask, strict=True) if learned]
        or list(ids)
        for ids, mask in calibration.examples
    ]
