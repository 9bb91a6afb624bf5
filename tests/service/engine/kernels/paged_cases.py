"""Steps of paged attention with everything poisoned that no query may see, and their reference
implementation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from service.engine.attention.paged import PagedInputs, TritonPagedAttention
from service.engine.attention.query_tiles import query_tiles
from service.engine.attention.reference import AttentionOptions, attend
from service.engine.kernels.paged_configs import KernelConfig, Phase
from service.engine.kv.cache import KVShape, PagedKV

#: Where the kernels run: compiled on CUDA, otherwise interpreted.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PLAIN = AttentionOptions(0.3)
OPTIONS = {
    "plain": PLAIN,
    "window": AttentionOptions(0.3, sliding_window=11),
    "softcap": AttentionOptions(0.3, softcap=2.0),
    "both": AttentionOptions(0.3, sliding_window=5, softcap=1.0),
}


@dataclass(frozen=True)
class Geometry:
    num_heads: int = 8
    num_kv_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    block_size: int = 8
    dtype: torch.dtype = torch.float32
    device: str = DEVICE


@dataclass
class Step:
    """q: [T, Hq, D_k]; expected: [T, Hq, D_v] in float32; inputs as the kernels read them."""

    kv: PagedKV
    q: Tensor
    expected: Tensor
    inputs: PagedInputs

    def run(
        self, options: AttentionOptions = PLAIN, configs: Mapping[Phase, KernelConfig] | None = None
    ) -> Tensor:
        return TritonPagedAttention(self.kv, self.inputs, configs=configs).attend_cached(0, self.q, options)


def make_step(
    geometry: Geometry,
    chunks: Sequence[tuple[int, int]],
    options: AttentionOptions = PLAIN,
    *,
    queries_per_tile: int = 4,
    can_split: bool | None = None,
    seed: int = 0,
) -> Step:
    """A step over chunks of (tokens computed before, tokens of the step), those of one token first; a chunk
    (-1, 1) is a padded row. Blocks lie scattered; whatever no query of the step sees is NaN."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [start + count for start, count in chunks]
    num_single = sum(count == 1 for _, count in chunks)
    assert all(count == 1 for _, count in chunks[:num_single])
    g = geometry
    num_blocks = [math.ceil(length / g.block_size) for length in lengths]
    width = max(1, *num_blocks) + 1
    order = torch.randperm(sum(num_blocks) + 1, generator=generator) + 1
    poisoned, order = order[0], order[1:]
    table = torch.full((len(chunks), width), int(poisoned))
    kv = PagedKV(
        [KVShape(g.num_kv_heads, g.key_dim, g.value_dim)],
        num_blocks=sum(num_blocks) + 1,
        block_size=g.block_size,
        device=torch.device(g.device),
        dtype=g.dtype,
    )
    pages = kv.pages_of(0)
    for page in pages:
        page.fill_(math.nan)
    queries, expected = [], []
    for index, (start, count) in enumerate(chunks):
        q = torch.randn(count, g.num_heads, g.key_dim, generator=generator).to(g.dtype)
        queries.append(q)
        if start < 0:
            expected.append(torch.zeros(1, g.num_heads, g.value_dim))
            continue
        blocks, order = order[: num_blocks[index]], order[num_blocks[index] :]
        table[index, : len(blocks)] = blocks
        K, V = (
            torch.randn(g.num_kv_heads, lengths[index], dim, generator=generator).to(g.dtype)
            for dim in (g.key_dim, g.value_dim)
        )
        expected.append(reference_attention(q, K, V, start, options))
        first = max(0, start + 1 - (options.sliding_window or lengths[index]))
        seen = torch.arange(first, lengths[index])
        for page, values in zip(pages, (K, V), strict=True):
            at = (blocks[seen // g.block_size].to(g.device), slice(None), (seen % g.block_size).to(g.device))
            page[at] = values[:, seen].transpose(0, 1).to(g.device)
    rows = np.cumsum([0, *(count for _, count in chunks)])[num_single:-1]
    tiles = query_tiles(
        rows.tolist(),
        [start for start, _ in chunks[num_single:]],
        [count for _, count in chunks[num_single:]],
        first_sequence=num_single,
        queries_per_tile=queries_per_tile,
    )
    inputs = PagedInputs(
        table.to(g.device),
        torch.tensor(lengths).to(g.device),
        num_single,
        torch.from_numpy(tiles).to(g.device),
        queries_per_tile,
        can_split,
    )
    return Step(kv, torch.cat(queries).to(g.device), torch.cat(expected).to(g.device), inputs)


def reference_attention(q: Tensor, K: Tensor, V: Tensor, start: int, options: AttentionOptions) -> Tensor:
    """The attention of one sequence with its first query at position `start`. q: [Q, Hq, D_k], K: [Hkv, L,
    D_k], V: [Hkv, L, D_v]; returns [Q, Hq, D_v] in float32."""
    if options.sinks is not None:
        options = replace(options, sinks=options.sinks.to(q.device))
    count, num_heads, dim = q.shape
    heads, length, _ = K.shape
    positions = start + torch.arange(count)[:, None]
    keys = torch.arange(length)[None]
    hidden = keys > positions
    if options.sliding_window is not None:
        hidden |= keys <= positions - options.sliding_window
    queries = q.float().view(1, count, heads, num_heads // heads, dim).permute(0, 2, 3, 1, 4)
    return attend(queries, K.float()[None], V.float()[None], hidden[None, None, None], options)[0]
