"""Attention over the paged KV cache, as an attention function of transformers: plain torch, any device.

    o[t] = Σ_l softmax_l(cap(scaling · q[t] · k[l])) v[l]     over l <= position[t], l > position[t] - window

With an attention sink s, the softmax also runs over s, which takes weight and adds nothing to the output.

Models call the function that is registered as `NAME`. It delegates to the step that `attending` has set for
the duration of a forward pass. A keyword argument would be plainer, but some models do not pass theirs on to
attention (StableLM, Nemotron). This is the reference implementation: it gathers K and V, so it serves every
model and checks faster kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from service.engine.kv.blocks import NULL_BLOCK
from service.engine.kv.cache import KVShape, PagedKV
from service.engine.kv.memory import Ints
from service.engine.scheduling.plan import Chunk

NAME = "tessera_paged"

#: Block tables up to this length are not separated for the sake of shorter ones among them.
_SMALL_TABLE = 8


class NotPageable(Exception):
    """A model needs attention that `paged_attention` does not compute."""


#: Arguments of attention functions that change the result and are not implemented here.
_UNSUPPORTED = ("position_bias", "head_mask", "score_mod")


@dataclass(frozen=True)
class AttentionOptions:
    """The kind of attention that a layer needs."""

    scaling: float
    #: How many positions a query sees, its own included; None for all earlier ones.
    sliding_window: int | None = None
    #: Scores become softcap * tanh(score / softcap).
    softcap: float | None = None
    #: The attention sink of every query head, [Hq], as a score that is neither scaled nor capped.
    sinks: Tensor | None = field(default=None, compare=False, repr=False)


class AttentionStep(Protocol):
    """The attention of one step."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """Store the K and V of the tokens, and attend. q: [Hq, T, D_k], k: [Hkv, T, D_k], v: [Hkv, T, D_v];
        returns [T, Hq, D_v]."""
        ...

    def attend_cached(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        """Attend when the K and V of the tokens are in the cache already. q: [T, Hq, D_k]; returns
        [T, Hq, D_v]."""
        ...


@dataclass(frozen=True)
class TokenRows:
    """The tokens of one step: integers [T] on the model's device."""

    input_ids: Tensor
    positions: Tensor
    #: The block where the KV of each token belongs.
    blocks: Tensor
    #: Its place within the block.
    offsets: Tensor


#: Makes the attention of a step from its rows and the uploaded integers.
MakeStep = Callable[[PagedKV, TokenRows, list[Tensor]], AttentionStep]


class AttentionLayout(Protocol):
    """Prepares what one implementation of attention reads of a step."""

    def lay_out(self, chunks: Sequence[Chunk], block_size: int) -> tuple[list[Ints], MakeStep]:
        """Return the integers to upload, and a function that makes the attention from them."""
        ...


#: The step of the forward pass that runs on this thread.
_current_step: ContextVar[AttentionStep | None] = ContextVar("current_step", default=None)


@contextmanager
def attending(step: AttentionStep) -> Iterator[None]:
    """Let the models that run in this context attend by `step`."""
    token = _current_step.set(step)
    try:
        yield
    finally:
        _current_step.reset(token)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query, key, value: [1, heads, T, D]; returns [1, T, Hq, D_v]. Raises `NotPageable`."""
    step = _current_step.get()
    needs = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if attention_mask is not None:
        needs.append("a mask of the model's own")
    if query.shape[2] != key.shape[2]:
        needs.append("keys of other tokens than those of its queries")
    if step is None or needs:
        raise NotPageable(f"{type(module).__name__} needs {', '.join(needs) or 'a call within a step'}")
    options = AttentionOptions(scaling or query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return step.attend(layer, query[0], key[0], value[0], options)[None], None


AttentionInterface.register(NAME, paged_attention)


def implementation_of(model: PreTrainedModel) -> str:
    """Return the attention implementation of the layers that process text. A model of several parts may have
    another name at its top, because not all of its parts can change theirs (the vision tower of GOT-OCR2)."""
    return model.config.get_text_config()._attn_implementation or "eager"


class AttentionTile:
    """Some rows of the batch that attend together: n sequences with Q queries each."""

    def __init__(
        self, start: int, table: Tensor, positions: Tensor, *, lengths: Sequence[int] | None = None
    ) -> None:
        #: Their first row in the batch.
        self.start = start
        #: int64 [n, blocks], padded with block 0.
        self.table = table
        #: int64 [n, Q]
        self.positions = positions
        #: Tokens of the contexts, if the host knows them.
        self.lengths = lengths
        self._masks: dict[int | None, Tensor] = {}
        self._pages: dict[int, Tensor] = {}

    def pages(self, kv: PagedKV, num_kv_heads: int) -> Tensor:
        if num_kv_heads not in self._pages:
            self._pages[num_kv_heads] = kv.pages(num_kv_heads, self.table)
        return self._pages[num_kv_heads]

    def hidden(self, length: int, window: int | None) -> Tensor:
        """Return which of `length` keys each query does not see, bool [n, 1, 1, Q, length]."""
        if window not in self._masks:
            keys = torch.arange(length, device=self.positions.device)
            queries = self.positions[:, None, None, :, None]
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            self._masks[window] = hidden
        return self._masks[window]


class PagedAttention:
    """The attention of one step. blocks, offsets: int64 [T], the places where the KV of the tokens
    belongs."""

    def __init__(self, kv: PagedKV, blocks: Tensor, offsets: Tensor, tiles: list[AttentionTile]) -> None:
        self._kv = kv
        self._blocks = blocks
        self._offsets = offsets
        self.tiles = tiles
        self._rows: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        num_kv_heads = k.shape[0]
        if num_kv_heads not in self._rows:
            self._rows[num_kv_heads] = self._kv.rows(num_kv_heads, self._blocks, self._offsets)
        self._kv.write(layer, k, v, self._rows[num_kv_heads])
        return self.attend_cached(layer, q.transpose(0, 1), options)

    def attend_cached(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        shape = self._kv.shapes[layer]
        out = q.new_empty(q.shape[0], q.shape[1], shape.value_dim)
        for tile in self.tiles:
            n, Q = tile.positions.shape
            K, V = self._kv.read(layer, tile.pages(self._kv, shape.num_kv_heads))
            rows = slice(tile.start, tile.start + n * Q)
            queries = q[rows].view(n, Q, shape.num_kv_heads, -1, q.shape[-1]).permute(0, 2, 3, 1, 4)
            hidden = tile.hidden(K.shape[2], options.sliding_window)
            out[rows] = attend(queries, K, V, hidden, options).flatten(0, 1)
        return out


@dataclass(frozen=True)
class TiledLayout:
    """The layout of `PagedAttention`: requests that attend together share a tile of bounded memory."""

    #: Keys of a tile, which are gathered at once: 64 Ki tokens are 256 MB of K and V at 8B geometry in
    #: bfloat16.
    keys: int = 64 * 1024
    #: Queries × keys of a tile for one head: 2 Mi scores are 256 MB at 32 heads in float32.
    scores: int = 2 * 1024 * 1024

    def lay_out(self, chunks: Sequence[Chunk], block_size: int) -> tuple[list[Ints], MakeStep]:
        tiles = list(self._tiles(chunks, block_size))

        def make(kv: PagedKV, rows: TokenRows, pieces: list[Tensor]) -> AttentionStep:
            pairs = zip(pieces[::2], pieces[1::2], strict=True)
            made = [
                AttentionTile(start, table, positions, lengths=(known[:, -1] + 1).tolist())
                for (start, _, known), (table, positions) in zip(tiles, pairs, strict=True)
            ]
            return PagedAttention(kv, rows.blocks, rows.offsets, made)

        return [array for _, table, positions in tiles for array in (table, positions)], make

    def _tiles(self, chunks: Sequence[Chunk], block_size: int) -> Iterator[tuple[int, Ints, Ints]]:
        """Yield the first row, the block table and the positions of each tile."""
        starts = list(itertools.accumulate((chunk.length for chunk in chunks), initial=0))
        num_single = sum(chunk.length == 1 for chunk in chunks)
        tables = [chunk.request.blocks[: -(-chunk.end // block_size)] for chunk in chunks]
        for first, last in _group_tables(
            [len(table) for table in tables[:num_single]], self.keys // block_size
        ):
            padded = np.full((last - first, len(tables[first])), NULL_BLOCK, np.int64)
            for index, table in enumerate(tables[first:last]):
                padded[index, : len(table)] = table
            yield first, padded, np.asarray([[chunk.start] for chunk in chunks[first:last]], np.int64)
        for chunk, table, row in zip(
            chunks[num_single:], tables[num_single:], starts[num_single:-1], strict=True
        ):
            step = max(1, self.scores // (len(table) * block_size))
            for start in range(chunk.start, chunk.end, step):
                end = min(start + step, chunk.end)
                visible = np.asarray([table[: -(-end // block_size)]], np.int64)
                yield row + start - chunk.start, visible, np.arange(start, end, dtype=np.int64)[None]


def _group_tables(num_blocks: Sequence[int], max_blocks: int) -> Iterator[tuple[int, int]]:
    """Split block tables, given longest first, into runs that attend in one tile. A run keeps within the
    memory of a tile, and none of its tables is less than half as long as the first: otherwise most of what is
    gathered would be padding."""
    first = 0
    for index, count in enumerate(num_blocks):
        longest = num_blocks[first]
        is_too_short = longest > _SMALL_TABLE and 2 * count < longest
        if is_too_short or (index > first and (index + 1 - first) * longest > max_blocks):
            yield first, index
            first = index
    if num_blocks:
        yield first, len(num_blocks)


def attend(q: Tensor, K: Tensor, V: Tensor, hidden: Tensor, options: AttentionOptions) -> Tensor:
    """Grouped-query attention of n sequences.

    q: [n, Hkv, G, Q, D_k]; K: [n, Hkv, L, D_k]; V: [n, Hkv, L, D_v]; hidden: bool [n, 1, 1, Q, L]; returns
    [n, Q, Hkv * G, D_v]. The softmax is in float32, as in transformers.
    """
    n, heads, G, Q, _ = q.shape
    scores = (q.flatten(2, 3) @ K.transpose(2, 3)) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.view(n, heads, G, Q, -1).masked_fill_(hidden, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype).view(heads, G, 1, 1).expand(n, heads, G, Q, 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : K.shape[2]].to(V.dtype)
    out = weights.flatten(2, 3) @ V  # [n, Hkv, G * Q, D_v]
    return out.view(n, heads, G, Q, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


class WindowedStep:
    """`step` with other windows in some layers than these layers pass."""

    def __init__(self, step: AttentionStep, windows: Mapping[int, int | None]) -> None:
        self._step = step
        self._windows = windows

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        if layer in self._windows:
            options = replace(options, sliding_window=self._windows[layer])
        return self._step.attend(layer, q, k, v, options)

    def attend_cached(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        return self._step.attend_cached(layer, q, options)


class AttentionProbe:
    """Stands in for a step and records what every layer stores and needs, from the arguments of its calls."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}
        self.options: dict[int, AttentionOptions] = {}
        self.num_heads = self.num_calls = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        self.shapes[layer] = KVShape(k.shape[0], k.shape[-1], v.shape[-1])
        self.options[layer] = options
        self.num_heads = q.shape[0]
        self.num_calls += 1
        return q.new_zeros(q.shape[1], q.shape[0], v.shape[-1])

    def attend_cached(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        raise AssertionError("a probe goes through the model's own layers")
