"""Models that compute attention themselves, run over the paged KV cache as `generate` would run them.

Falcon, Bloom, GPT-J, MPT and others never call an attention function that we register, but they read K and V
through the `Cache` interface of transformers. So a step becomes one forward pass per tile of the batch
(`attention.reference.AttentionTile`): first the requests that decode, side by side and padded at the left,
then each piece of a prompt by itself. Each pass gets a cache with layers that write to the paged KV and
gather from it.

This is slower than attention over pages: K and V are gathered in every layer, sequences of different lengths
are padded to the longest of their tile, and a step takes as many passes as it has tiles.

Some layers count the tokens of the cache to know their position (Llama 4 scales its queries by it). Padding
would count too, so such a model gets only sequences of the same length in a pass.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from service.engine.adapters.slots import SlotTable
from service.engine.attention.reference import AttentionTile, PagedAttention, TokenRows
from service.engine.kv.blocks import NULL_BLOCK
from service.engine.kv.cache import KVShape, PagedKV
from tessera.model.pooling import HeadInput

#: The argument of models that can compute the logits of some rows alone.
_KEEPS_LOGITS = "logits_to_keep"


class NotCacheable(Exception):
    """A model stores something else than one K and V per layer and token."""


class _ProbeCache(DynamicCache):  # type: ignore[misc]
    """Notices whether layers ask for the number of their tokens.

    Two such calls do not count: the model asks before its first layer, for the mask, and MPT's layers ask
    without their number, for distances, which padding does not change.
    """

    def __init__(self) -> None:
        super().__init__()
        #: Whether a layer has asked how many of its tokens there are.
        self.has_counting_layers = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self.has_counting_layers |= layer_idx > 0 and bool(self.layers)
        return int(super().get_seq_length(layer_idx))


def probe(model: PreTrainedModel) -> tuple[tuple[KVShape, ...], bool, Tensor]:
    """Return what each layer stores per token, whether layers count the tokens of the cache, and the logits
    [1, V] of one token. Raises `NotCacheable`."""
    cache = _ProbeCache()
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    logits = _run(model, zero, zero, torch.ones_like(zero), cache)
    shapes = []
    for layer in cache.layers:
        K, V = getattr(layer, "keys", None), getattr(layer, "values", None)
        if K is None or V is None or K.ndim != 4 or V.ndim != 4 or K.shape[2] != 1 or V.shape[2] != 1:
            raise NotCacheable("does not keep one key and one value per layer and token")
        shapes.append(KVShape(K.shape[1], K.shape[3], V.shape[3]))
    if not shapes:
        raise NotCacheable("keeps no KV cache: it computes the whole text again for every token")
    return tuple(shapes), cache.has_counting_layers, logits[0]


class CachedModel:
    """Runs the steps of `model`. has_counting_layers: see `probe`."""

    def __init__(self, model: PreTrainedModel, *, has_counting_layers: bool = False) -> None:
        self._model = model
        self._has_counting_layers = has_counting_layers

    def forward(
        self,
        rows: TokenRows,
        kv: PagedKV,
        step: PagedAttention,
        logit_rows: Tensor | None,
        tables: Sequence[SlotTable],
    ) -> Tensor:
        """Return the logits [n, V] of some rows of the batch, int64 [n], or of all rows. tables: the slots of
        every resident basis."""
        return self._forward(rows, kv, step, logit_rows, tables, None)[0]

    def forward_hidden(
        self,
        rows: TokenRows,
        kv: PagedKV,
        step: PagedAttention,
        logit_rows: Tensor,
        tables: Sequence[SlotTable],
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [n, V] of some rows of the batch, int64 [n], and the hidden states [n, d] that
        the output head read."""
        with HeadInput(self._model) as head_input:
            logits, hidden = self._forward(rows, kv, step, logit_rows, tables, head_input)
        assert hidden is not None
        return logits, hidden

    def _forward(
        self,
        rows: TokenRows,
        kv: PagedKV,
        step: PagedAttention,
        logit_rows: Tensor | None,
        tables: Sequence[SlotTable],
        head_input: HeadInput | None,
    ) -> tuple[Tensor, Tensor | None]:
        if logit_rows is None:
            logit_rows = torch.arange(len(rows.input_ids), device=rows.input_ids.device)
        staged = [(table, table.active) for table in tables if table.active is not None]
        logits: Tensor | None = None
        hidden: Tensor | None = None
        try:
            for tile in _of_one_length(step.tiles) if self._has_counting_layers else step.tiles:
                own = slice(tile.start, tile.start + tile.positions.numel())
                for table, slots in staged:
                    table.active = slots[own]
                num_rows = own.stop - own.start
                is_own = (logit_rows >= own.start) & (logit_rows < own.stop)
                tile_rows = (logit_rows - tile.start).clamp(0, num_rows - 1)
                tile_logits = self._tile_logits(tile, rows, own, kv, tile_rows)
                logits = tile_logits if logits is None else torch.where(is_own[:, None], tile_logits, logits)
                if head_input is not None:
                    states = self._tile_hidden(head_input.take(), tile, tile_rows)
                    hidden = states if hidden is None else torch.where(is_own[:, None], states, hidden)
        finally:
            for table, slots in staged:
                table.active = slots
        assert logits is not None
        return logits, hidden

    def _tile_hidden(self, states: Tensor, tile: AttentionTile, tile_rows: Tensor) -> Tensor:
        """Return the hidden states [n, d] of some rows of a tile. states: what the head has read, of these
        rows if the model computes only their logits, otherwise of all rows of the tile."""
        is_selected = tile.positions.shape[0] == 1 and _KEEPS_LOGITS in _parameters(self._model)
        states = states.flatten(0, -2)
        return states if is_selected else states.index_select(0, tile_rows)

    def _tile_logits(
        self, tile: AttentionTile, rows: TokenRows, own: slice, kv: PagedKV, tile_rows: Tensor
    ) -> Tensor:
        """Return the logits [n, V] of some rows of a tile. own: the rows of the tile in the batch; tile_rows:
        int64 [n]."""
        num_sequences, num_queries = tile.positions.shape
        tile_kv = _TileKV(kv, tile, rows.blocks[own], rows.offsets[own])
        layers: list[Any] = [_PagedLayer(tile_kv, index) for index in range(len(kv.shapes))]
        input_ids = rows.input_ids[own].view(num_sequences, num_queries)
        kept = tile_rows if num_sequences == 1 else None
        logits = _run(self._model, input_ids, tile.positions, tile_kv.mask, Cache(layers=layers), kept)
        logits = logits.flatten(0, 1)
        return logits if kept is not None else logits.index_select(0, tile_rows)


def _of_one_length(tiles: Sequence[AttentionTile]) -> Iterator[AttentionTile]:
    """Yield the same rows in tiles of sequences that have the same length. A tile of several sequences has
    one row of each, the longest first."""
    for tile in tiles:
        assert tile.lengths is not None, "steps from plans know the lengths"
        first = 0
        for length, same in itertools.groupby(tile.lengths):
            last = first + len(list(same))
            yield AttentionTile(
                tile.start + first * tile.positions.shape[1],
                tile.table[first:last],
                tile.positions[first:last],
                lengths=[length] * (last - first),
            )
            first = last


class _TileKV:
    """The K and V of the sequences of one tile. L is the length of the longest context.

    blocks, offsets: int64 [n * Q], the places where the K and V of its tokens belong.
    """

    def __init__(self, kv: PagedKV, tile: AttentionTile, blocks: Tensor, offsets: Tensor) -> None:
        self._kv = kv
        self._blocks, self._offsets = blocks, offsets
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_sequences, self.num_queries = tile.positions.shape
        self.length = max(tile.lengths) if tile.lengths else tile.table.shape[1] * kv.block_size
        columns = torch.arange(self.length, device=tile.positions.device)
        positions = columns - (self.length - 1 - tile.positions[:, -1:])  # [n, L]
        is_padding = positions < 0
        held = tile.table.gather(1, positions.clamp(min=0) // kv.block_size)
        self._held = torch.where(is_padding, NULL_BLOCK, held)
        self._at = torch.where(is_padding, 0, positions % kv.block_size)
        #: int64 [n, L], 0 where a sequence is padded at the left.
        self.mask = (~is_padding).long()

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k [n, Hkv, Q, D_k] and v [n, Hkv, Q, D_v]. Returns K and V [n, Hkv, L, D] of the contexts."""
        num_heads = k.shape[1]
        if num_heads not in self._rows:
            new = self._kv.rows(num_heads, self._blocks, self._offsets)
            self._rows[num_heads] = new, self._kv.rows(num_heads, self._held, self._at)
        new, whole = self._rows[num_heads]
        k, v = (x.transpose(0, 1).flatten(1, 2).to(self._kv.dtype) for x in (k, v))
        self._kv.write(layer, k, v, new)
        K, V = self._kv.read_rows(layer, whole)
        size = (self.num_sequences, num_heads, self.length, -1)
        return K.view(size), V.view(size)


class _PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `Cache` over a tile."""

    is_sliding = False

    def __init__(self, tile: _TileKV, index: int) -> None:
        super().__init__()
        self._tile, self._index = tile, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to allocate."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._tile.update(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of what `update` returns."""
        return self._tile.length, 0

    def get_seq_length(self) -> int:
        return self._tile.length - self._tile.num_queries

    def get_max_length(self) -> int:
        return -1


def _run(
    model: PreTrainedModel,
    input_ids: Tensor,
    positions: Tensor,
    mask: Tensor,
    cache: Cache,
    logit_rows: Tensor | None = None,
) -> Tensor:
    """Return the logits [n, Q, V]. logit_rows: for a single sequence, the rows to compute. input_ids,
    positions: int64 [n, Q]; mask: int64 [n, L]."""
    known = _parameters(model)
    if "past_key_values" not in known:
        raise NotCacheable("keeps no KV cache: it computes the whole text again for every token")
    options: dict[str, Any] = {}
    if "position_ids" in known:
        options["position_ids"] = positions
    if _KEEPS_LOGITS in known and logit_rows is not None:
        options[_KEEPS_LOGITS] = logit_rows
    output = model(input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
    logits: Tensor = output.logits
    if logit_rows is not None and _KEEPS_LOGITS not in known:
        logits = logits.index_select(1, logit_rows)
    return logits


def _parameters(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters
