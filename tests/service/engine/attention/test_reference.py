"""Paged attention against the simplest attention possible: one query, one head, one loop at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from service.engine.attention.reference import (
    AttentionOptions,
    AttentionProbe,
    NotPageable,
    TiledLayout,
    attending,
    paged_attention,
)
from service.engine.kv.cache import KVShape, PagedKV
from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.steps.batch import build_batch
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tests.service.engine.models import family

BLOCK_SIZE = 4
CPU = torch.device("cpu")
#: (tokens computed before, tokens of the step) of each sequence.
MIXES = {
    "decode": [(0, 1), (7, 1), (30, 1), (8, 1)],
    "prefill": [(0, 9), (0, 1), (0, 16)],
    "chunks": [(4, 3), (13, 8), (1, 2)],
    "mixed": [(70, 1), (3, 1), (5, 11), (0, 6), (19, 1)],
}
OPTIONS = {
    "plain": AttentionOptions(0.3),
    "window": AttentionOptions(0.3, sliding_window=5),
    "softcap": AttentionOptions(0.3, softcap=2.0),
    "both": AttentionOptions(0.3, sliding_window=3, softcap=1.0),
}
SINKS = torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0, 9.0, -9.0, 2.0])


def slow_attention(q: Tensor, K: Tensor, V: Tensor, position: int, options: AttentionOptions) -> Tensor:
    """The attention of one query q [Hq, D] at `position` over K, V [L, Hkv, D]; returns [Hq, D_v]."""
    first = 0 if options.sliding_window is None else max(0, position - options.sliding_window + 1)
    heads = []
    for head in range(q.shape[0]):
        kv_head = head // (q.shape[0] // K.shape[1])
        scores = K[first : position + 1, kv_head] @ q[head] * options.scaling
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        sink = 0.0 if options.sinks is None else options.sinks[head].exp()
        weights = scores.exp() / (scores.exp().sum() + sink)
        heads.append(weights @ V[first : position + 1, kv_head])
    return torch.stack(heads)


def make_plan(mix: list[tuple[int, int]]) -> StepPlan:
    """A plan of requests with blocks that are scattered over the pool."""
    order = torch.randperm(200).add(1).tolist()
    chunks = []
    for index, (start, length) in enumerate(mix):
        request = GenerationRequest(str(index), "t", list(range(start + length)), SamplingParams())
        sequence = EngineRequest(request, index, b"root")
        sequence.blocks = [order.pop() for _ in range(math.ceil((start + length) / BLOCK_SIZE))]
        sequence.num_computed = start
        chunks.append(Chunk(sequence, start, length))
    return StepPlan(sorted(chunks, key=lambda c: (0, -c.end) if c.length == 1 else (1, 0)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("layout", [TiledLayout(), TiledLayout(keys=16, scores=32)], ids=str)
def test_matches_slow_attention(
    heads: tuple[int, int],
    mix: list[tuple[int, int]],
    options: AttentionOptions,
    layout: TiledLayout,
    has_sinks: bool,
) -> None:
    torch.manual_seed(0)
    (num_heads, num_kv_heads), key_dim, value_dim = heads, 8, 5
    options = replace(options, sinks=SINKS[:num_heads] if has_sinks else None)
    shape = KVShape(num_kv_heads, key_dim, value_dim)
    kv = PagedKV([shape] * 2, num_blocks=200, block_size=BLOCK_SIZE, device=CPU, dtype=torch.float32)
    plan = make_plan(mix)
    history = []
    for chunk in plan.chunks:  # tokens that were computed before
        K, V = (torch.randn(chunk.end, num_kv_heads, dim) for dim in (key_dim, value_dim))
        history.append((K, V))
        positions = torch.arange(chunk.start)
        blocks = torch.tensor(chunk.request.blocks)[positions // BLOCK_SIZE]
        rows = kv.rows(num_kv_heads, blocks, positions % BLOCK_SIZE)
        kv.write(1, K[: chunk.start].transpose(0, 1), V[: chunk.start].transpose(0, 1), rows)
    q = torch.randn(num_heads, plan.num_tokens, key_dim)
    k = torch.cat([K[chunk.start :] for (K, _), chunk in zip(history, plan.chunks, strict=True)]).transpose(
        0, 1
    )
    v = torch.cat([V[chunk.start :] for (_, V), chunk in zip(history, plan.chunks, strict=True)]).transpose(
        0, 1
    )

    out = build_batch(plan, kv, layout, CPU).attention.attend(1, q, k, v, options)

    row = 0
    for (K, V), chunk in zip(history, plan.chunks, strict=True):
        for position in range(chunk.start, chunk.end):
            expected = slow_attention(q[:, row], K, V, position, options)
            torch.testing.assert_close(out[row], expected, rtol=1e-5, atol=1e-6)
            row += 1
    assert row == len(out)


def test_a_reused_block_leaves_no_trace() -> None:
    shapes = [KVShape(2, 4, 4), KVShape(1, 8, 3), KVShape(2, 4, 4)]
    kv = PagedKV(shapes, num_blocks=6, block_size=BLOCK_SIZE, device=CPU, dtype=torch.float32)
    for layer, shape in enumerate(shapes):
        rows = kv.rows(shape.num_kv_heads, torch.tensor([2, 3]), torch.tensor([0, 3]))
        poison = torch.full((shape.num_kv_heads, 2, 1), torch.nan)
        kv.write(layer, poison.expand(-1, -1, shape.key_dim), poison.expand(-1, -1, shape.value_dim), rows)

    kv.clear(torch.tensor([3]))

    for layer, shape in enumerate(shapes):
        for block, is_poisoned in ((2, True), (3, False)):
            K, V = kv.read(layer, kv.pages(shape.num_kv_heads, torch.tensor([[block]])))
            assert bool(K.isnan().any()) is bool(V.isnan().any()) is is_poisoned
    assert kv.nbytes == 7 * BLOCK_SIZE * sum(shape.bytes_per_token(torch.float32) for shape in shapes)


def test_what_cannot_be_paged_is_refused() -> None:
    module = family("llama").base.model.model.layers[0].self_attn
    q = torch.zeros(1, 4, 1, 16)
    with pytest.raises(NotPageable, match="within a step"):
        paged_attention(module, q, q, q, None)
    with attending(AttentionProbe()), pytest.raises(NotPageable, match="position_bias"):
        paged_attention(module, q, q, q, None, position_bias=torch.zeros(4))
    with attending(AttentionProbe()), pytest.raises(NotPageable, match="mask"):
        paged_attention(module, q, q, q, torch.zeros(1, 1, 1, 1))


def test_a_step_ends_with_its_forward_pass() -> None:
    module = family("llama").base.model.model.layers[0].self_attn
    q = torch.zeros(1, 4, 1, 16)
    outer, inner = AttentionProbe(), AttentionProbe()
    with attending(outer):
        with attending(inner):
            paged_attention(module, q, q, q, None)
        paged_attention(module, q, q, q, None)
        paged_attention(module, q, q, q, None)
    assert (outer.num_calls, inner.num_calls) == (2, 1)
    with pytest.raises(NotPageable):
        paged_attention(module, q, q, q, None)
