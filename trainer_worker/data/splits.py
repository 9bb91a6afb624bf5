"""Which examples are held back: whole groups, so that no answer is on both sides of a split.

Where answers are texts, examples with the same or nearly the same answer form a group. Otherwise a model that
learns the answers by heart would look like one that generalises: with 60 questions to 20 answers, the loss on
held-out copies went 2.68 / 1.52 / 0.48 / 0.02 with rising learning rate, while the loss on new answers went
1.14 / 2.23 / 3.24 / 4.04. Where answers are labels, every label has to be on both sides, so each distinct
example is a group of its own.

Everything follows from the contents of the examples, so the same file gives the same split. Knows no model.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

#: Answers of at most this many tokens, in the median, are labels, numbers or names.
MAX_LABEL_TOKENS = 8
#: Longer answers are labels too if each one belongs to this many examples in the mean: the job is to choose
#: among a few fixed texts.
MIN_COPIES_OF_LABELS = 6
#: Two answers are nearly the same if they share this part of their pairs of neighbouring tokens (Jaccard).
NEAR_SHARE = 0.9
#: With more distinct answers, only identical ones are grouped, because all pairs are compared.
MAX_COMPARED = 1000

#: The tokens to learn of one example, row after row, one character each: a tuple of them takes ten times as
#: much memory.
Answer = str


def answer_of(tokens: Iterable[int]) -> Answer:
    """Return the answer with these token ids, which are smaller than the 1,114,112 characters of Unicode."""
    return "".join(map(chr, tokens))


def group_examples(answers: Sequence[Answer], digests: Sequence[str]) -> list[str]:
    """Return the name of each example's group: the smallest digest in it.

    digests: hashes of the examples. Equal examples are always in one group.
    """
    keys: Sequence[object] = digests if are_labels(answers) else _near_groups(answers)
    names: dict[object, str] = {}
    for key, digest in zip(keys, digests, strict=True):
        names[key] = min(digest, names.get(key, digest))
    return [names[key] for key in keys]


def are_labels(answers: Sequence[Answer]) -> bool:
    """Return whether the answers are chosen from a few, or so short that equal ones mean nothing."""
    lengths = sorted(map(len, answers))
    is_short = lengths[len(lengths) // 2] <= MAX_LABEL_TOKENS
    return is_short or len(answers) >= MIN_COPIES_OF_LABELS * len(set(answers))


def hold_back(groups: Sequence[str], num_examples: int) -> set[str]:
    """Return the groups to hold back, with about `num_examples` examples; at least one group is left."""
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    chosen: set[str] = set()
    num_chosen = 0
    for group in sorted(sizes, key=_order):
        too_many = num_chosen + sizes[group] - num_examples > num_examples - num_chosen
        if num_chosen >= num_examples or (chosen and too_many) or len(chosen) + 1 == len(sizes):
            continue
        chosen.add(group)
        num_chosen += sizes[group]
    return chosen if num_examples else set()


def assign_folds(groups: Sequence[str], num_folds: int) -> list[int]:
    """Return the fold of each example; folds have about the same number of examples."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    sizes = [0] * num_folds
    folds = [0] * len(groups)
    for group in sorted(members, key=lambda name: (-len(members[name]), _order(name))):
        fold = sizes.index(min(sizes))
        for index in members[group]:
            folds[index] = fold
        sizes[fold] += len(members[group])
    return folds


def _order(group: str) -> str:
    """A group's place. Hashed, because a group's name is the smallest of its digests."""
    return hashlib.sha256(group.encode()).hexdigest()


def _near_groups(answers: Sequence[Answer]) -> list[int]:
    """Return the group of each answer: one number for identical and nearly identical ones."""
    distinct = {answer: number for number, answer in enumerate(dict.fromkeys(answers))}
    root = list(range(len(distinct)))
    if len(distinct) <= MAX_COMPARED:
        _join_near(list(distinct), root)
    groups = [_find(root, distinct[answer]) for answer in answers]
    largest = max(Counter(groups).values())
    if 2 * largest > len(answers):  # answers of one form, such as JSON with two fields: not copies
        return [distinct[answer] for answer in answers]
    return groups


def _join_near(answers: Sequence[Answer], root: list[int]) -> None:
    pairs = [frozenset(pairwise(answer)) for answer in answers]
    order = sorted(range(len(answers)), key=lambda number: len(pairs[number]))
    for place, first in enumerate(order):
        for second in order[place + 1 :]:
            if len(pairs[first]) < NEAR_SHARE * len(pairs[second]):
                break  # all later ones are even larger
            shared = len(pairs[first] & pairs[second])
            if shared >= NEAR_SHARE * (len(pairs[first]) + len(pairs[second]) - shared):
                root[_find(root, second)] = _find(root, first)


def _find(root: list[int], number: int) -> int:
    while root[number] != number:
        root[number] = root[root[number]]
        number = root[number]
    return number
