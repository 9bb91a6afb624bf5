"""The paged attention kernels on a CUDA device: bfloat16, the sizes of serving, CUDA graphs, large caches.

Skipped without a device. `test_paged_attention.py` runs on a device too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from service.engine.attention.paged import (
    PagedInputs,
    TritonPagedAttention,
    decode_split_target,
    launch_config,
)
from service.engine.attention.query_tiles import wants_split
from service.engine.kernels.paged_configs import Phase
from service.engine.kv.cache import KVShape, PagedKV
from tests.service.engine.kernels.paged_cases import (
    OPTIONS,
    PLAIN,
    Geometry,
    Step,
    make_step,
    reference_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CHUNKS = [(4095, 1), (1000, 1), (255, 1), (16, 1), (0, 1), (-1, 1), (700, 300), (0, 513), (33, 2)]
HEADS = {"mha": (4, 4), "gqa4": (32, 8), "gqa7": (14, 2), "mqa": (16, 1)}


def assert_exact(step: Step, out: torch.Tensor) -> None:
    tolerance = TOLERANCE[step.q.dtype]
    torch.testing.assert_close(out.float(), step.expected, rtol=tolerance, atol=tolerance)


def make_kv(num_blocks: int) -> PagedKV:
    """One layer of 8B geometry."""
    shapes = [KVShape(8, 128, 128)]
    return PagedKV(
        shapes, num_blocks=num_blocks, block_size=16, device=torch.device("cuda"), dtype=torch.bfloat16
    )


def make_serving_step(geometry: Geometry, options: str = "plain", can_split: bool | None = None) -> Step:
    """A step with as many queries per tile as in serving."""
    shape = KVShape(geometry.num_kv_heads, geometry.key_dim, geometry.value_dim)
    config = launch_config(Phase.PREFILL, shape, geometry.dtype, torch.device("cuda"))
    per_tile = config.block_m // (geometry.num_heads // geometry.num_kv_heads)
    return make_step(geometry, CHUNKS, OPTIONS[options], queries_per_tile=per_tile, can_split=can_split)


def serving_cases() -> Iterator[tuple[torch.dtype, str, str]]:
    """A few cases, because each compiles kernels of its own."""
    yield from ((torch.bfloat16, "gqa4", options) for options in OPTIONS)
    yield from ((torch.bfloat16, heads, "both") for heads in HEADS)
    yield from ((dtype, "gqa4", "plain") for dtype in TOLERANCE)


@pytest.mark.parametrize(("dtype", "heads", "options"), sorted(set(serving_cases()), key=str), ids=str)
def test_serving_sizes(dtype: torch.dtype, heads: str, options: str) -> None:
    geometry = Geometry(*HEADS[heads], key_dim=128, value_dim=128, block_size=16, dtype=dtype)
    for can_split in (False, True):
        step = make_serving_step(geometry, options, can_split)
        assert_exact(step, step.run(OPTIONS[options]))


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_head_dimensions(dim: int, dtype: torch.dtype) -> None:
    geometry = Geometry(8, 2, key_dim=dim, value_dim=dim, block_size=16, dtype=dtype)
    step = make_serving_step(geometry)

    assert_exact(step, step.run())


@pytest.mark.parametrize("block_size", [8, 64, 256])
def test_block_sizes(block_size: int) -> None:
    geometry = Geometry(8, 2, key_dim=64, value_dim=64, block_size=block_size, dtype=torch.bfloat16)
    step = make_serving_step(geometry)

    assert_exact(step, step.run())


@pytest.mark.parametrize("can_split", [False, True], ids=["whole", "split"])
def test_a_graph_is_replayed_at_other_lengths(can_split: bool) -> None:
    geometry = Geometry(32, 8, key_dim=128, value_dim=128, block_size=16, dtype=torch.bfloat16)
    mixes = [
        [(4000, 1), (70, 1), (15, 1), (-1, 1)],
        [(3, 1), (-1, 1), (2500, 1), (600, 1)],
        [(-1, 1), (-1, 1), (-1, 1), (4090, 1)],
    ]
    steps = [make_step(geometry, mix, can_split=can_split, seed=i) for i, mix in enumerate(mixes)]
    first = steps[0]
    width = 4096 // 16 + 1
    kv = make_kv(max(len(step.kv.pages_of(0)[0]) for step in steps))
    tables = torch.zeros(4, width, dtype=torch.int32, device="cuda")
    lengths = torch.zeros(4, dtype=torch.int32, device="cuda")
    q = torch.zeros_like(first.q)
    inputs = PagedInputs(tables, lengths, 4, can_split=can_split)

    def run() -> torch.Tensor:
        return TritonPagedAttention(kv, inputs).attend_cached(0, q, PLAIN)

    def fill(step: Step) -> None:
        tables.zero_()
        tables[:, : step.inputs.tables.shape[1]] = step.inputs.tables
        lengths.copy_(step.inputs.lengths)
        q.copy_(step.q)
        for page, other in zip(kv.pages_of(0), step.kv.pages_of(0), strict=True):
            page[: len(other)] = other

    fill(first)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    for step in [*steps, first]:
        fill(step)
        graph.replay()
        assert_exact(step, out)


def test_addresses_beyond_two_billion_elements() -> None:
    num_blocks = 140_000  # of 16 Ki elements each
    kv = make_kv(num_blocks)
    blocks = torch.tensor([num_blocks, num_blocks - 3, 1], device="cuda")
    K, V = (torch.randn(8, 40, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(1, 32, 128, device="cuda", dtype=torch.bfloat16)
    tokens = torch.arange(40, device="cuda")
    own, offsets = blocks[tokens // 16], tokens % 16
    inputs = PagedInputs(blocks[None], torch.tensor([40], device="cuda"), 1)
    queries = q.expand(40, -1, -1).transpose(0, 1)

    out = TritonPagedAttention(kv, inputs, own, offsets).attend(0, queries, K, V, PLAIN)[:1]

    expected = reference_attention(q.cpu(), K.cpu(), V.cpu(), 39, PLAIN)
    torch.testing.assert_close(out.cpu().float(), expected, rtol=2e-2, atol=2e-2)


def test_a_large_batch_of_uneven_contexts() -> None:
    geometry = Geometry(32, 8, key_dim=128, value_dim=128, block_size=16, dtype=torch.bfloat16)
    chunks = [(8000, 1), *((length % 300, 1) for length in range(0, 255 * 37, 37))]
    step = make_step(geometry, chunks)
    lengths = [start + count for start, count in chunks]

    assert wants_split(lengths, decode_split_target(step.kv))
    for can_split in (False, True, None):
        inputs = PagedInputs(step.inputs.tables, step.inputs.lengths, len(chunks), can_split=can_split)
        assert_exact(step, TritonPagedAttention(step.kv, inputs).attend_cached(0, step.q, PLAIN))
