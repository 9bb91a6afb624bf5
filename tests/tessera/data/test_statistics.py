"""Counts over files of examples: duplicates, near duplicates, distinct answers."""

from __future__ import annotations

import json
import random

import pytest

from tessera.data.examples import parse_examples
from tessera.data.statistics import count, statistics_of

WORDS = [f"word{number}" for number in range(500)]


def text(generator: random.Random, length: int) -> str:
    return " ".join(generator.choices(WORDS, k=length))


def test_a_file_is_counted_by_whole_examples_and_by_answers() -> None:
    turn = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
    shouted = {"messages": [{"role": "user", "content": "WHO?"}, {"role": "assistant", "content": "Me."}]}
    lines = [turn, turn, shouted, {"prompt": "Who?", "completion": "You."}, {"text": "A poem."}]
    found = statistics_of(parse_examples("\n".join(map(json.dumps, lines)).encode()))
    assert (found.num_examples, found.num_duplicates, found.num_near_duplicates) == (5, 1, 1)
    assert found.num_distinct_answers == 3


@pytest.mark.parametrize(("changed", "is_near"), [(1, True), (2, True), (25, False)])
def test_near_duplicates_are_found_by_their_common_words(changed: int, is_near: bool) -> None:
    """A copy of a text of 60 words in which some have been replaced, among 200 other texts."""
    misses = 0
    for seed in range(20):
        generator = random.Random(seed)
        texts = [text(generator, 60) for _ in range(200)]
        words = texts[7].split()
        for place in generator.sample(range(60), changed):
            words[place] = "new"
        found = count((text, "") for text in [*texts, " ".join(words)])
        misses += found.num_near_duplicates != int(is_near)
    assert misses <= 1


def test_examples_that_share_an_instruction_are_not_near_and_take_no_square_of_time() -> None:
    generator = random.Random(0)
    texts = [f"Sort this ticket into one of the five classes: {text(generator, 30)}" for _ in range(20_000)]
    assert count((text, "a") for text in texts).num_near_duplicates == 0
