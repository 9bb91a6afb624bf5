"""The scale s of a job."""

from __future__ import annotations

import pytest

from tessera.errors import InvalidInput
from tessera.methods.scaling import Scaling


@pytest.mark.parametrize(
    ("scaling", "rank", "s"),
    [
        (Scaling(), 8, None),
        (Scaling(scale=3.0), 8, 3.0),
        (Scaling(alpha=16), 8, 2.0),
        (Scaling(alpha=16), 64, 0.25),
        (Scaling(alpha=16, use_rslora=True), 64, 2.0),
        (Scaling(use_rslora=True), 64, 8.0),
    ],
)
def test_s_by_rank(scaling: Scaling, rank: int, s: float | None) -> None:
    assert scaling.of(rank) == s
    assert scaling.is_given == (s is not None)
    scaling.check()


@pytest.mark.parametrize(
    ("scaling", "param"),
    [(Scaling(2.0, alpha=8), "alpha"), (Scaling(2.0, use_rslora=True), "use_rslora")],
)
def test_two_ways_at_once_are_refused(scaling: Scaling, param: str) -> None:
    with pytest.raises(InvalidInput) as error:
        scaling.check()
    assert error.value.param == param
