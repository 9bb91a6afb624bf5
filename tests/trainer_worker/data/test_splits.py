"""Which examples stay together, and how they are held back and put into folds."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from trainer_worker.data.splits import (
    Answer,
    answer_of,
    are_labels,
    assign_folds,
    group_examples,
    hold_back,
)


def long_answer(seed: int, length: int = 30) -> Answer:
    generator = random.Random(seed)
    return answer_of(generator.randrange(1000) for _ in range(length))


def digests(count: int) -> list[str]:
    return [f"{number:05d}" for number in range(count)]


def test_copies_of_an_answer_stay_together() -> None:
    answers = [long_answer(number % 20) for number in range(60)]
    groups = group_examples(answers, digests(60))
    assert not are_labels(answers)
    for first in range(60):
        for second in range(60):
            assert (groups[first] == groups[second]) == (first % 20 == second % 20)


def test_nearly_the_same_answers_stay_together() -> None:
    base = long_answer(1, length=60)
    changed = base[:30] + chr(5000) + base[31:]  # two of the 59 pairs of neighbours
    other = base[:20] + long_answer(2, length=40)
    groups = group_examples([base, changed, other, *(long_answer(n) for n in range(10, 20))], digests(13))
    assert groups[0] == groups[1]
    assert len(set(groups)) == 12


@pytest.mark.parametrize(
    "answers",
    [
        [answer_of((number % 5, 2)) for number in range(60)],  # short labels
        [answer_of((number, 7, 2)) for number in range(60)],  # short, all different
        [long_answer(number % 4) for number in range(60)],  # one of four fixed replies
    ],
)
def test_each_example_is_its_own_group_where_answers_are_labels(answers: list[Answer]) -> None:
    assert are_labels(answers)
    assert group_examples(answers, digests(60)) == digests(60)


def test_equal_examples_are_one_group_even_with_labels() -> None:
    assert group_examples([answer_of((1, 2))] * 4, ["a", "a", "b", "c"]) == ["a", "a", "b", "c"]


def test_a_common_form_does_not_make_one_group_of_everything() -> None:
    """Answers in JSON share most of their tokens; they are not copies of each other."""
    form = long_answer(3, length=80)
    answers = [form[:40] + chr(2000 + number) + form[41:] for number in range(30)]
    assert len(set(group_examples(answers, digests(30)))) == 30


def test_many_answers_take_no_square_of_time() -> None:
    answers = [long_answer(number) for number in range(30_000)]
    assert group_examples(answers, digests(30_000)) == digests(30_000)


def test_whole_groups_are_held_back() -> None:
    groups = [str(number % 20) for number in range(60)]
    chosen = hold_back(groups, 6)
    assert sum(group in chosen for group in groups) == 6
    assert hold_back(groups, 0) == set()
    assert hold_back(["a"] * 9, 4) == set(), "one group has to be left to train on"
    assert len(hold_back(["a"] * 9 + ["b"], 2)) == 1


def test_a_large_group_is_not_held_back_if_others_do() -> None:
    groups = ["large"] * 50 + [str(number) for number in range(50)]
    assert "large" not in hold_back(groups, 5) or len(hold_back(groups, 5)) == 1


def test_the_split_does_not_depend_on_the_order() -> None:
    groups = [str(number % 13) for number in range(50)]
    shuffled = random.Random(1).sample(groups, len(groups))
    assert hold_back(groups, 8) == hold_back(shuffled, 8)


def test_folds_keep_groups_together_and_have_about_the_same_size() -> None:
    groups = [str(number % 20) for number in range(60)]
    folds = assign_folds(groups, 3)
    assert max(Counter(folds).values()) - min(Counter(folds).values()) <= 3
    assert len({(group, fold) for group, fold in zip(groups, folds, strict=True)}) == 20
