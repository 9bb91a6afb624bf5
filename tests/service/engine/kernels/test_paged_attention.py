"""The paged attention kernels, interpreted on the CPU, against the reference implementation, with all else
poisoned."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.attention.paged import TritonPagedAttention, queries_per_tile
from service.engine.attention.query_tiles import query_tiles, wants_split
from service.engine.attention.reference import AttentionOptions
from service.engine.kernels.paged_configs import CONFIGS, KernelConfig, Phase, find_config
from service.engine.kv.cache import KVShape, PagedKV
from tests.service.engine.kernels.paged_cases import (
    DEVICE,
    OPTIONS,
    PLAIN,
    Geometry,
    Step,
    make_step,
    reference_attention,
)

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
#: Small tiles of keys and small parts, so that a short context has many of both.
SMALL = {phase: KernelConfig(16, 16, 1, 1, 6, 16) for phase in Phase}
#: Lengths of a decode step: a padded row, one key, and both sides of the borders of blocks (8), tiles and
#: parts.
DECODE = [(79, 1), (64, 1), (63, 1), (16, 1), (15, 1), (8, 1), (7, 1), (0, 1), (-1, 1)]
PREFILL = [(0, 9), (13, 8), (60, 5), (1, 2)]
MIXED = [(70, 1), (3, 1), (5, 11), (0, 6)]


def assert_exact(step: Step, out: torch.Tensor) -> None:
    tolerance = TOLERANCE[step.q.dtype]
    torch.testing.assert_close(out.float(), step.expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunks", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (5, 1)], ids=str)
def test_matches_the_reference_implementation(
    heads: tuple[int, int], chunks: list[tuple[int, int]], options: AttentionOptions
) -> None:
    step = make_step(Geometry(*heads, key_dim=16, value_dim=16), chunks, options, queries_per_tile=5)

    assert_exact(step, step.run(options, SMALL))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("can_split", [False, True], ids=["whole", "split"])
def test_splitting_changes_nothing(can_split: bool, options: AttentionOptions) -> None:
    step = make_step(Geometry(4, 1), [(255, 1), (40, 1), (-1, 1)], options, can_split=can_split)

    assert_exact(step, step.run(options, SMALL))


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("can_split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_sinks(dtype: torch.dtype, can_split: bool, window: int | None) -> None:
    """A sink counts once, whatever the number of parts of a context, and adds nothing to a padded row."""
    sinks = torch.tensor([-2.0, 0.0, 3.0, 8.0], dtype=dtype, device=DEVICE)
    options = AttentionOptions(0.3, window, sinks=sinks)
    chunks = [(255, 1), (40, 1), (0, 1), (-1, 1), (50, 9)]
    step = make_step(Geometry(4, 2, dtype=dtype), chunks, options, can_split=can_split)

    assert_exact(step, step.run(options, SMALL))


@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (48, 20)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_head_dimensions(dims: tuple[int, int], dtype: torch.dtype) -> None:
    step = make_step(Geometry(4, 2, *dims, block_size=16, dtype=dtype), [(37, 1), (20, 7)])

    assert_exact(step, step.run())


@settings(max_examples=15, deadline=None)
@given(
    single=st.lists(st.integers(-1, 90), max_size=3),
    several=st.lists(st.tuples(st.integers(0, 60), st.integers(2, 20)), max_size=2),
    heads=st.sampled_from([(1, 1), (4, 1), (8, 1), (10, 2)]),
    block_size=st.sampled_from([8, 16, 64]),
    window=st.one_of(st.none(), st.integers(1, 70)),
    softcap=st.sampled_from([None, 3.0]),
    has_sinks=st.booleans(),
    per_tile=st.integers(3, 9),
    config=st.sampled_from([None, SMALL]),
    can_split=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_step(
    single: list[int],
    several: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    per_tile: int,
    config: dict[Phase, KernelConfig] | None,
    can_split: bool,
    seed: int,
) -> None:
    chunks = [(start, 1) for start in single] + several
    if not chunks:
        return
    sinks = torch.linspace(-3, 4, heads[0], device=DEVICE) if has_sinks else None
    options = AttentionOptions(0.2, window, softcap, sinks)
    geometry = Geometry(*heads, key_dim=16, value_dim=16, block_size=block_size)
    step = make_step(geometry, chunks, options, queries_per_tile=per_tile, can_split=can_split, seed=seed)

    assert_exact(step, step.run(options, config))


def test_a_step_over_changed_lengths_is_cut_anew() -> None:
    """A CUDA graph uses the same object with other numbers in the same tensors."""
    long = make_step(Geometry(), [(60, 1), (20, 1)], can_split=True)
    short = make_step(Geometry(), [(7, 1), (-1, 1)], can_split=True, seed=1)
    attention = TritonPagedAttention(long.kv, long.inputs, configs=SMALL)
    assert_exact(long, attention.attend_cached(0, long.q, PLAIN))

    long.inputs.lengths.copy_(short.inputs.lengths)
    long.inputs.tables[:, : short.inputs.tables.shape[1]] = short.inputs.tables
    for page, other in zip(long.kv.pages_of(0), short.kv.pages_of(0), strict=True):
        page[: len(other)] = other
    attention.begin()

    assert_exact(short, attention.attend_cached(0, short.q, PLAIN))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("can_split", [False, True], ids=["whole", "split"])
def test_tiles_among_padding(can_split: bool, options: AttentionOptions) -> None:
    """A CUDA graph of a mixed step does this: there are tiles for single queries too, and some without a
    query."""
    step = make_step(Geometry(), [(200, 1), (9, 1), (90, 11), (0, 6)], options, can_split=can_split)
    inputs, padding = step.inputs, torch.zeros(3, 4, dtype=torch.int64, device=DEVICE)
    assert inputs.tiles is not None
    singles = torch.tensor([[0, 1, 200, 0], [1, 1, 9, 1]], device=DEVICE)
    step.inputs = replace(
        inputs,
        lengths=inputs.lengths[:0],
        num_single=0,
        singles=torch.cat([singles, padding]),
        tiles=torch.cat([inputs.tiles, padding]),
    )

    assert_exact(step, step.run(options, SMALL))


def test_layers_with_and_without_a_window_share_a_step() -> None:
    shapes = [KVShape(2, 16, 16)] * 2
    kv = PagedKV(shapes, num_blocks=12, block_size=8, device=torch.device(DEVICE), dtype=torch.float32)
    step = make_step(Geometry(4, 2, 16, 16), [(70, 1), (40, 1)], can_split=True)
    windowed = OPTIONS["window"]
    q = torch.randn(2, 4, 16)
    history = {}
    for layer in range(2):
        K, V = (torch.randn(2, 71, 16) for _ in range(2))
        history[layer] = (K, V)
        for page, values in zip(kv.pages_of(layer), (K, V), strict=True):
            page[1:10] = torch.cat([values, torch.zeros(2, 1, 16)], 1).view(2, 9, 8, 16).transpose(0, 1)
    step.inputs.tables[:, :9] = torch.arange(1, 10)
    step.inputs.lengths.copy_(torch.tensor([71, 41]))
    attention = TritonPagedAttention(kv, step.inputs, configs=SMALL)

    for layer, options in enumerate((PLAIN, windowed)):
        out = attention.attend_cached(layer, q.to(DEVICE), options).cpu()
        for row, length in enumerate((71, 41)):
            K, V = (values[:, :length] for values in history[layer])
            expected = reference_attention(q[row : row + 1], K, V, length - 1, options)
            torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_nan_of_one_sequence_stays_its_own() -> None:
    step = make_step(Geometry(), [(40, 1), (30, 1), (9, 5), (4, 6)])
    for page in step.kv.pages_of(0):
        page[step.inputs.tables[[1, 3], 0]] = torch.nan

    out = step.run(configs=SMALL).cpu()

    broken = torch.tensor([False, True, *[False] * 5, *[True] * 6])
    assert torch.equal(out.isnan().flatten(1).any(1), broken)
    torch.testing.assert_close(out[~broken], step.expected.cpu()[~broken], rtol=1e-5, atol=1e-5)


def test_queries_may_be_strided() -> None:
    step = make_step(Geometry(), MIXED)
    expected = step.run()
    wide = torch.full((len(step.q), 11, 40), torch.nan, device=DEVICE)
    wide[:, 2:10, 4:36] = step.q

    step.q = wide[:, 2:10, 4:36]

    assert torch.equal(step.run(), expected)
    step.q = step.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(step.run(), expected)


def test_attend_keeps_the_tokens_kv_first() -> None:
    """The KV of a prefill is all from the step itself, and that of a padded row is not stored."""
    step = make_step(Geometry(4, 2, 32, 16), [(-1, 1), (0, 9)])
    K, V = step.kv.pages_of(0)
    first, second = step.inputs.tables[1, :2].tolist()
    blocks = torch.tensor([0] + [first] * 8 + [second], device=DEVICE)
    offsets = torch.tensor([0, *range(8), 0], device=DEVICE)
    k, v = K[blocks, :, offsets].transpose(0, 1), V[blocks, :, offsets].transpose(0, 1)  # [Hkv, T, D]
    k, v = k.nan_to_num(5.0), v.nan_to_num(5.0)
    K.fill_(torch.nan)
    V.fill_(torch.nan)

    out = TritonPagedAttention(step.kv, step.inputs, blocks, offsets).attend(
        0, step.q.transpose(0, 1), k, v, PLAIN
    )

    assert_exact(step, out)
    for page, kept in ((K, k), (V, v)):
        assert torch.equal(page[blocks[1:], :, offsets[1:]], kept[:, 1:].transpose(0, 1))
        assert int(page.isfinite().sum()) == kept[:, 1:].numel()  # nothing else, and not the null block


@pytest.mark.parametrize("target", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("window", [None, 1, 30])
def test_work_is_cut_into_parts_that_cover_each_key_once(target: int, window: int | None) -> None:
    from service.engine.kernels import paged_attention

    lengths = torch.tensor([512, 260, 255, 129, 16, 1, 0], device=DEVICE)
    num_items = len(lengths) + target
    items = torch.full((num_items, 8), -7, dtype=torch.int32, device=DEVICE)
    parts = torch.full((len(lengths), 4), -7, dtype=torch.int32, device=DEVICE)

    paged_attention.cut_work[(1,)](
        lengths, items, parts, len(lengths), num_items, target, window or 1 << 30, 16, 256, True, True
    )

    items, parts = items.cpu(), parts.cpu()
    used = int(parts[:, 3].sum())
    assert used <= num_items
    assert bool((items[used:, 1] == 0).all())
    assert parts[:, 2].tolist() == [0, *itertools.accumulate(parts[:-1, 3].tolist())]
    assert parts[-2:, 3].tolist() == [1, 1]
    if window is None:
        assert int(parts[0, 3]) > 1 or target < 3
    for row, length in enumerate(lengths.tolist()):
        _, _, first, count = parts[row].tolist()
        own = items[first : first + count].tolist()
        assert all(item[:3] == [row, 1, max(length - 1, 0)] and item[5] == row for item in own)
        assert {bool(item[6]) for item in own} == {count > 1}
        assert own[0][3] <= max(0, length - (window or length))
        assert own[0][3] % 16 == 0
        assert [item[4] for item in own[:-1]] == [item[3] for item in own[1:]]
        assert own[-1][4] == length


def test_tiles_hold_every_query_once_the_longest_first() -> None:
    tiles = query_tiles([3, 10, 12], [0, 40, 7], [7, 2, 5], first_sequence=3, queries_per_tile=3)

    assert tiles[0].tolist() == [10, 2, 40, 4]
    rows = [row for first, count, _, _ in tiles.tolist() for row in range(first, first + count)]
    assert sorted(rows) == list(range(3, 17))
    for first, _, position, sequence in tiles.tolist():
        first_row, start = {3: (3, 0), 4: (10, 40), 5: (12, 7)}[sequence]
        assert first - first_row == position - start
    assert query_tiles([], [], [], first_sequence=0, queries_per_tile=3).shape == (0, 4)


def test_contexts_are_split_where_it_pays() -> None:
    assert wants_split([1000], target=32)
    assert not wants_split([80], target=32)
    assert wants_split([1000] * 16, target=32)
    assert not wants_split([1000] * 64, target=32)
    assert wants_split([32_000] + [200] * 255, target=32)
    assert not wants_split([], target=32)
    assert wants_split([300], target=32, part_tokens=128)
    assert not wants_split([300], target=32, part_tokens=256)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 227 * 1024])
def test_every_head_dimension_has_a_launch_shape_that_fits(
    dim: int, itemsize: int, shared_bytes: int
) -> None:
    for phase in Phase:
        config = find_config(phase, dim, dim, itemsize, shared_bytes=shared_bytes)
        assert config.shared_bytes(dim, dim, itemsize) <= shared_bytes
        assert (phase, config.block_n & (config.block_n - 1)) == (phase, 0)


def test_tiles_of_queries_fill_a_program() -> None:
    shape = KVShape(2, 128, 128)
    kv = PagedKV([shape], num_blocks=1, block_size=8, device=torch.device(DEVICE), dtype=torch.bfloat16)

    block_m = CONFIGS[Phase.PREFILL, 128, 2].block_m
    assert [queries_per_tile(kv, heads) for heads in (2, 8, 14)] == [block_m, block_m // 4, block_m // 7]
