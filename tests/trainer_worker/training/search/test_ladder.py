"""How large a search is."""

from __future__ import annotations

from typing import Any

import pytest

from trainer_worker.training.search.ladder import MULTIPLES, Ladder, choose_ladder, idle_tokens

USUAL: dict[str, Any] = {
    "num_examples": 60,
    "num_groups": 60,
    "tokens_per_step": 300,
    "max_tokens": 8192,
    "has_held_out": True,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Ladder(MULTIPLES, 3)),
        ({"num_groups": 2}, Ladder(MULTIPLES, 2)),
        ({"tokens_per_step": 600}, Ladder(MULTIPLES, 2)),
        ({"max_tokens": 0}, Ladder(MULTIPLES, 0)),
        ({"num_examples": 200}, Ladder(MULTIPLES, 0)),
        ({"num_examples": 501}, None),
        ({"num_examples": 6, "has_held_out": False, "max_tokens": 0}, Ladder((1.0,), 2)),
        ({"num_examples": 1, "num_groups": 1, "has_held_out": False}, None),
        ({"num_groups": 0}, Ladder(MULTIPLES, 0)),  # the owner's own validation file
    ],
)
def test_the_size_follows_from_the_data_and_the_device(
    change: dict[str, Any], expected: Ladder | None
) -> None:
    assert choose_ladder(**{**USUAL, **change}) == expected


def test_a_search_fills_at_most_the_idle_part_of_a_step() -> None:
    for tokens in range(1, 2000, 50):
        ladder = choose_ladder(**{**USUAL, "tokens_per_step": tokens})
        assert ladder is not None
        assert not ladder.num_folds or ladder.num_runs * tokens <= USUAL["max_tokens"]


def test_larger_models_fill_the_device_with_fewer_tokens() -> None:
    sizes = [10**8, 10**9, 4 * 10**9, 8 * 10**9, 10**11]
    tokens = [idle_tokens(is_gpu=True, num_parameters=size) for size in sizes]
    assert tokens == [8192, 8192, 4000, 2048, 2048]
    assert idle_tokens(is_gpu=False, num_parameters=10**8) == 0
