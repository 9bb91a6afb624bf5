"""Attention of one step over the paged KV cache by Triton kernels: split contexts in decode, chunked prefill.

Computes the same as `reference.PagedAttention`, and is tested against it. All decode rows go through one
launch, all prefill tiles through another. Both grids consist of items that a kernel cuts from the lengths on
the device, once per step (`kernels/paged_attention.py`). Triton is imported at the first launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.engine.attention.query_tiles import few_programs, query_tiles, split_target
from service.engine.attention.reference import AttentionOptions, AttentionStep, MakeStep, TokenRows
from service.engine.kernels.paged_configs import MIN_BLOCK_M, KernelConfig, Phase, find_config, padded_dim
from service.engine.kv.block_tables import BlockTables
from service.engine.kv.cache import KVShape, PagedKV
from service.engine.kv.memory import Ints
from service.engine.scheduling.plan import Chunk

#: The window of layers that have none: longer than any context.
_NO_WINDOW = 1 << 30
#: The smallest number of tiles that the cutting kernel is compiled for. Few sizes mean few compilations while
#: serving.
_MIN_TILES = 256
#: Number of parts that are added up at a time.
_BLOCK_P = 16
#: The assumed number of multiprocessors on a CPU, so that the interpreter's work is split too.
_CPU_MULTIPROCESSORS = 8


@dataclass(frozen=True)
class PagedInputs:
    """The inputs of the kernels for one step: integer tensors on the KV's device, each int32 or int64.

    Tiles and singles without a query are padding. Rows of the batch that are in none of them stay as they
    were allocated.
    """

    #: [N, blocks], the blocks of each sequence. Entries past its length are never read.
    tables: Tensor
    #: [N], tokens of each context after the step. A length of 0 is a padded row, and its output is zeros.
    lengths: Tensor
    #: The first sequences have one query each, and row n of the batch belongs to sequence n.
    num_single: int
    #: [P, 4], the queries of the other sequences, from `query_tiles.query_tiles` with queries_per_tile.
    tiles: Tensor | None = None
    queries_per_tile: int = 1
    #: Whether long contexts may be split over several programs, see `query_tiles.wants_split`; with None the
    #: number of tiles decides.
    can_split: bool | None = None
    #: [S, 4], tiles of one query each; they replace lengths and num_single.
    singles: Tensor | None = None

    def of_phase(self, phase: Phase) -> Tensor:
        """Return the work that `paged_attention.cut_work` divides: lengths [n], or tiles [n, 4]."""
        if phase == Phase.DECODE:
            return self.lengths[: self.num_single] if self.singles is None else self.singles
        return self.tables[:0] if self.tiles is None else self.tiles


@dataclass(frozen=True)
class DeviceLimits:
    """The limits of a device for a launch."""

    num_multiprocessors: int
    #: The most shared memory of one program; None if there is no limit.
    shared_bytes: int | None


@cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Return the limits of `device`, or stand-ins on a CPU."""
    if device.type != "cuda":
        return DeviceLimits(_CPU_MULTIPROCESSORS, None)
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", None)
    return DeviceLimits(properties.multi_processor_count, shared_bytes)


@cache
def launch_config(phase: Phase, shape: KVShape, dtype: torch.dtype, device: torch.device) -> KernelConfig:
    """Return the launch shape for heads of `shape` on `device`."""
    shared_bytes = device_limits(device).shared_bytes
    return find_config(phase, shape.key_dim, shape.value_dim, dtype.itemsize, shared_bytes=shared_bytes)


def queries_per_tile(kv: PagedKV, num_heads: int) -> int:
    """Return the number of queries that a prefill program takes, for a model with `num_heads` query heads."""
    K, _ = kv.pages_of(0)
    config = launch_config(Phase.PREFILL, kv.shapes[0], K.dtype, K.device)
    return max(1, config.block_m // (num_heads // kv.shapes[0].num_kv_heads))


def decode_split_target(kv: PagedKV) -> int:
    """Return the number of items that fill the device in decode, the `target` of
    `query_tiles.wants_split`."""
    return _split_limits(kv, Phase.DECODE)[0]


def prefill_split_limits(kv: PagedKV) -> tuple[int, int]:
    """Return the same for prefill, and the smallest part in tokens."""
    return _split_limits(kv, Phase.PREFILL)


def _split_limits(kv: PagedKV, phase: Phase) -> tuple[int, int]:
    K, _ = kv.pages_of(0)
    config = launch_config(phase, kv.shapes[0], K.dtype, K.device)
    num_multiprocessors = device_limits(K.device).num_multiprocessors
    target = split_target(kv.shapes[0].num_kv_heads, num_multiprocessors, config.programs_per_sm)
    return target, config.part_tokens


@dataclass(frozen=True)
class _Work:
    """The items of one launch, as `kernels/paged_attention.py` describes them."""

    #: int32 [num_items, 8]
    items: Tensor
    #: int32 [num_tiles, 4]
    parts: Tensor
    can_split: bool


class TritonPagedAttention:
    """The attention of one step.

    blocks, offsets: integers [T], the places where the KV of the tokens belongs; callers that write K and V
    themselves do not need them. For a CUDA graph, make one over static tensors and call `begin` at the start
    of the captured step.
    """

    def __init__(
        self,
        kv: PagedKV,
        inputs: PagedInputs,
        blocks: Tensor | None = None,
        offsets: Tensor | None = None,
        *,
        configs: Mapping[Phase, KernelConfig] | None = None,
    ) -> None:
        self._kv = kv
        self._inputs = inputs
        self._blocks = blocks
        self._offsets = offsets
        self._configs = configs or {}
        self._phases = [phase for phase in Phase if len(inputs.of_phase(phase))]
        self._work: dict[tuple[Phase, int, int, int], _Work] = {}
        self._parts: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def begin(self) -> None:
        """Start a new step over the same tensors with other lengths, for which the work is cut again."""
        self._work.clear()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """Store the K and V of the tokens, and attend. q: [Hq, T, D_k], k: [Hkv, T, D_k], v: [Hkv, T, D_v];
        returns [T, Hq, D_v]."""
        assert self._blocks is not None
        assert self._offsets is not None
        shape = self._kv.shapes[layer]
        k, v = _with_dense_heads(k), _with_dense_heads(v)
        K, V = self._kv.pages_of(layer)
        _kernels().keep_kv[(k.shape[1],)](
            K, V, k, v, self._blocks, self._offsets, k.stride(1), k.stride(0), v.stride(1), v.stride(0),
            shape.num_kv_heads, shape.key_dim, shape.value_dim, self._kv.block_size,
            _power_of_two(shape.num_kv_heads), padded_dim(shape.key_dim), padded_dim(shape.value_dim),
        )  # fmt: skip
        return self.attend_cached(layer, q.transpose(0, 1), options)

    def attend_cached(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        """Attend when the K and V of the tokens are in the cache already. q: [T, Hq, D_k]; returns
        [T, Hq, D_v]."""
        q = _with_dense_heads(q)
        out = q.new_empty(q.shape[0], q.shape[1], self._kv.shapes[layer].value_dim)
        for phase in self._phases:
            self._launch(phase, layer, q, out, options)
        return out

    def _launch(self, phase: Phase, layer: int, q: Tensor, out: Tensor, options: AttentionOptions) -> None:
        shape = self._kv.shapes[layer]
        K, V = self._kv.pages_of(layer)
        group = q.shape[1] // shape.num_kv_heads
        rows = group * (1 if phase == Phase.DECODE else self._inputs.queries_per_tile)
        config = self._configs.get(phase) or launch_config(phase, shape, q.dtype, q.device)
        work = self._cut(phase, config, shape.num_kv_heads, options.sliding_window)
        num_items = len(work.items)
        part_out, part_stats = out, out  # neither is touched
        if work.can_split:
            part_out, part_stats = self._part_buffers(num_items, shape.num_kv_heads, rows, shape.value_dim)
        table = self._inputs.tables
        sinks = q if options.sinks is None else options.sinks  # the kernel does not read q there
        _kernels().attend_items[(shape.num_kv_heads, num_items)](
            q, K, V, out, part_out, part_stats, table, work.items, sinks,
            options.scaling, options.softcap or 0.0, options.sliding_window or _NO_WINDOW,
            q.stride(0), q.stride(1), table.stride(0),
            shape.num_kv_heads, group, shape.key_dim, shape.value_dim,
            self._kv.block_size, rows, max(MIN_BLOCK_M, _power_of_two(rows)), config.block_n,
            padded_dim(shape.key_dim), padded_dim(shape.value_dim),
            phase == Phase.DECODE, options.sliding_window is not None, options.softcap is not None,
            work.can_split, options.sinks is not None,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if work.can_split:
            _kernels().add_parts[(shape.num_kv_heads * rows, len(work.parts))](
                out, part_out, part_stats, work.parts, sinks, shape.num_kv_heads, group, shape.value_dim,
                rows, _BLOCK_P, padded_dim(shape.value_dim), options.sinks is not None, num_warps=1,
            )  # fmt: skip

    def _cut(self, phase: Phase, config: KernelConfig, num_kv_heads: int, window: int | None) -> _Work:
        """Return the items of all layers with this window, cut when the first of them attends."""
        device = self._inputs.tables.device
        target = split_target(num_kv_heads, device_limits(device).num_multiprocessors, config.programs_per_sm)
        key = (phase, window or _NO_WINDOW, target, config.part_tokens)
        if key not in self._work:
            self._work[key] = self._cut_now(*key)
        return self._work[key]

    def _cut_now(self, phase: Phase, window: int, target: int, part_tokens: int) -> _Work:
        inputs = self._inputs
        tiles = inputs.of_phase(phase)
        num_tiles = len(tiles)
        can_split = few_programs(num_tiles, target) if inputs.can_split is None else inputs.can_split
        num_items = num_tiles + (target if can_split else 0)
        work = _Work(
            torch.empty(num_items, 8, dtype=torch.int32, device=tiles.device),
            torch.empty(num_tiles, 4, dtype=torch.int32, device=tiles.device),
            can_split,
        )
        _kernels().cut_work[(1,)](
            tiles, work.items, work.parts, num_tiles, num_items, target, window,
            part_tokens, max(_MIN_TILES, _power_of_two(num_tiles)), tiles.ndim == 1, can_split,
        )  # fmt: skip
        return work

    def _part_buffers(self, *size: int) -> tuple[Tensor, Tensor]:
        """Buffers for the parts, float32 [items, Hkv, rows, D_v] and [items, Hkv, rows, 2], shared by all
        layers."""
        if size not in self._parts:
            device = self._inputs.tables.device
            self._parts[size] = (
                torch.empty(size, dtype=torch.float32, device=device),
                torch.empty(*size[:-1], 2, dtype=torch.float32, device=device),
            )
        return self._parts[size]


class PagedLayout:
    """The layout of `TritonPagedAttention`. queries_per_tile: see the function of this
    name."""

    def __init__(self, tables: BlockTables, queries_per_tile: int) -> None:
        self._tables = tables
        self._queries_per_tile = queries_per_tile

    def lay_out(self, chunks: Sequence[Chunk], block_size: int) -> tuple[list[Ints], MakeStep]:
        num_single = sum(chunk.length == 1 for chunk in chunks)
        starts = list(itertools.accumulate((chunk.length for chunk in chunks), initial=0))
        rows, entries = self._tables.plan([chunk.request.blocks for chunk in chunks])
        width = -(-max(chunk.end for chunk in chunks) // block_size)
        tiles = query_tiles(
            starts[num_single:-1],
            [chunk.start for chunk in chunks[num_single:]],
            [chunk.length for chunk in chunks[num_single:]],
            first_sequence=num_single,
            queries_per_tile=self._queries_per_tile,
        )
        lengths = np.asarray([chunk.end for chunk in chunks], np.int64)

        def make(kv: PagedKV, token_rows: TokenRows, pieces: list[Tensor]) -> AttentionStep:
            uploaded_rows, uploaded_entries, uploaded_lengths, uploaded_tiles = pieces
            self._tables.write(uploaded_entries)
            tables = self._tables.tables[:, :width].index_select(0, uploaded_rows)
            inputs = PagedInputs(tables, uploaded_lengths, num_single, uploaded_tiles, self._queries_per_tile)
            return TritonPagedAttention(kv, inputs, token_rows.blocks, token_rows.offsets)

        return [np.asarray(rows, np.int64), entries, lengths, tiles], make


def _with_dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _kernels() -> Any:
    from service.engine.kernels import paged_attention

    return paged_attention
