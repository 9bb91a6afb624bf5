"""Users given as such, and users made of one pile of examples."""

from __future__ import annotations

import torch

from tessera.methods.bases import CalibrationSet, Population, split_users
from tests.tessera.methods.populations import personal


def test_users_are_told_apart_in_what_a_population_is() -> None:
    a, b, c = (personal(seed, 4) for seed in range(3))
    text = CalibrationSet.from_texts([(3, 4, 5), (6, 7, 8)])
    mixed = Population.of([a, text, Population.of([b, c])])

    assert [len(user) for user in mixed.users] == [4, 2, 8]
    assert mixed.labelled().sizes == (4, 8)
    assert mixed.labelled().users[0].examples == a.examples
    assert Population.of([a, b]).labelled().sizes == (4, 4)
    assert mixed.digest != CalibrationSet(mixed.examples).digest
    assert mixed.digest != Population(mixed.examples, (6, 8)).digest
    assert mixed.take(3, seed=0).num_tokens > 0


def test_like_examples_make_a_user() -> None:
    """Four users with words of their own, shuffled into one pile, are found again."""
    piles = [
        tuple(((50 + u, 3 + 9 * u + i % 4, 4 + 9 * u + i % 3), (False, True, True)) for i in range(15))
        for u in range(4)
    ]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    examples = [example for pile in piles for example in pile]
    pile = CalibrationSet(tuple(examples[i] for i in order))

    groups = split_users(pile, 4, seed=3)

    assert [len(group) for group in groups] == [15] * 4
    assert {frozenset(ids[0] for ids, _ in group.examples) for group in groups} == {
        frozenset({50 + u}) for u in range(4)
    }
    assert split_users(pile, 4, seed=3) == groups
    assert sorted(len(group) for group in split_users(pile, 7)) == [8, 8, 8, 9, 9, 9, 9]
