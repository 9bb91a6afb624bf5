"""Steps in static tensors: every token, every query and every needed row appears once, and padding means
nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.steps.shapes import MAX_ROWS, ShapeLimits, lay_out, pieces
from service.engine.wire.messages import GenerationRequest, SamplingParams


def make_plan(sizes: list[tuple[int, int, bool]]) -> StepPlan:
    """sizes: for every chunk its start, its length, and whether the prompt ends with it."""
    chunks = []
    for order, (start, length, is_last) in enumerate(sorted(sizes, key=lambda size: size[1] > 1)):
        prompt = [1000 * order + position for position in range(start + length + (not is_last))]
        request = EngineRequest(GenerationRequest(str(order), "t", prompt, SamplingParams()), order, b"")
        request.slot = order % 3
        chunks.append(Chunk(request, start, length))
    return StepPlan(chunks)


CHUNKS = st.lists(
    st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 1, 2, 3, 7, 8, 9, 40]), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(sizes=CHUNKS, spare=st.integers(0, 9), per_tile=st.integers(1, 9))
def test_everything_is_in_its_place_once(
    sizes: list[tuple[int, int, bool]], spare: int, per_tile: int
) -> None:
    plan = make_plan(sizes)
    limits = ShapeLimits(len(sizes) + spare, plan.num_tokens + spare, per_tile)
    table_rows = [7 + index for index in range(len(plan.chunks))]
    shape = limits.mixed_shape(plan.num_tokens, can_split=False)
    rows, singles, tiles, logit_rows = pieces(lay_out(plan, table_rows, shape, per_tile), shape)

    expected = [
        (chunk.request.token_ids[position], position, table_row, chunk.request.slot)
        for chunk, table_row in zip(plan.chunks, table_rows, strict=True)
        for position in range(chunk.start, chunk.end)
    ]
    assert list(zip(*rows[:, : len(expected)].tolist(), strict=True)) == expected
    assert not rows[:, len(expected) :].any()
    queries = [
        (row + index, position + index, table_row)
        for tile in (singles, tiles)
        for row, count, position, table_row in tile.tolist()
        for index in range(count)
    ]
    assert sorted(queries) == [(row, *token[1:3]) for row, token in enumerate(expected)]
    assert (singles[:, 1] <= 1).all()
    assert (tiles[:, 1] <= per_tile).all()
    last_rows = np.cumsum([chunk.length for chunk in plan.chunks]) - 1
    sampling_rows = [row for row, chunk in zip(last_rows.tolist(), plan.chunks, strict=True) if chunk.samples]
    assert logit_rows.tolist()[: len(sampling_rows)] == sampling_rows
    assert not logit_rows[len(sampling_rows) :].any()


def test_a_step_that_decodes_has_a_logit_of_every_row() -> None:
    plan = make_plan([(5, 1, True), (9, 1, True), (0, 1, True), (3, 1, True), (3, 1, True)])
    limits = ShapeLimits(64, 512, 8)
    shape = limits.decode_shape(5, can_split=True)
    rows, singles, tiles, logit_rows = pieces(lay_out(plan, [1, 2, 3, 4, 5], shape, 8), shape)

    assert not shape.is_mixed
    assert shape.num_rows == 8
    assert rows[1].tolist() == [5, 9, 0, 3, 3, 0, 0, 0]
    assert singles.tolist() == [[i, 1, p, i + 1] for i, p in enumerate([5, 9, 0, 3, 3])] + [[0] * 4] * 3
    assert len(tiles) == len(logit_rows) == 0


def test_rows_alone_where_attention_takes_no_tiles() -> None:
    plan = make_plan([(5, 1, True), (0, 20, True)])
    shape = ShapeLimits(4, 512, None).mixed_shape(21, can_split=False)
    rows, singles, tiles, logit_rows = pieces(lay_out(plan, [1, 2], shape, None), shape)

    assert rows.shape == (4, 32)
    assert len(singles) == len(tiles) == 0
    assert logit_rows.tolist() == [0, 20, 0, 0]


@pytest.mark.parametrize(
    "limits", [ShapeLimits(256, 4096, 32), ShapeLimits(300, 700, 1), ShapeLimits(2, 2, 9)]
)
def test_shapes_are_few_and_fit(limits: ShapeLimits) -> None:
    shapes = list(limits.shapes())
    mixed = [limits.mixed_shape(count, can_split=False) for count in range(1, limits.max_mixed + 1)]
    decode = [limits.decode_shape(count, can_split=False) for count in range(1, limits.max_sequences + 1)]

    assert limits.max_mixed == min(limits.max_tokens, MAX_ROWS)
    assert set(mixed) | set(decode) == {shape for shape in shapes if not shape.can_split}
    assert len(set(shapes)) == len(shapes) == 2 * len(set(mixed) | set(decode)) <= 120
    for sizes in (mixed, decode):
        rows = [shape.num_rows for shape in sizes]
        assert all(size >= count for count, size in enumerate(rows, 1))
        assert rows == sorted(rows)
        assert max((size / count for count, size in enumerate(rows, 1) if count > 200), default=1) < 1.14
    assert mixed[-1].num_rows == limits.max_mixed
    assert decode[-1].num_rows == limits.max_sequences
