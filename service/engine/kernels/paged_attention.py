"""Triton kernels of attention over the paged KV cache: split the work, attend, add up the parts, store K and
V.

    o[t, h] = Σ_l softmax_l(cap(scaling · q[t, h] · K[l, h / G])) V[l, h / G]
              over l <= position[t] and l > position[t] - window

An attention sink of the head is one more score of the softmax, without a value.

The unit of work is an item: a tile (some queries of one sequence; in decode, one query) and a range of its
keys. A program runs one item for one KV head. The G query heads that share the KV head are packed as rows of
one matrix product, so K and V are read once. The items are cut on the device from the lengths; grids depend
on the size of the batch alone, so that a CUDA graph can be replayed at any lengths. Where a tile has several
items, each stores its maximum, its sum and its unnormalised output, and `add_parts` adds them up.

Only keys that some query of the tile sees are loaded. What lies beyond the end of a sequence, or in blocks of
others, is never read. A row without a visible key gives zeros. Importing this module needs Triton.

An item is 8 integers: first row of the tile in the batch, number of queries (0: no item), position of the
first query, first key, end of the keys, row in the block table, whether it is one of several parts, unused.
The parts of a tile are described by 4 integers: first row, number of queries, first item, number of items.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=["num_tiles", "num_items", "target", "window"],
    do_not_specialize_on_alignment=["tiles"],  # a part of an upload, at any offset
)
def cut_work(
    tiles, items, parts, num_tiles, num_items, target, window,
    UNIT: tl.constexpr, TILES: tl.constexpr, IS_DECODE: tl.constexpr, CAN_SPLIT: tl.constexpr,
):  # fmt: skip
    """Fill items[i] and parts[t]: the tiles in order, each cut into parts of whole UNITs of keys, about
    `target` parts in all.

    tiles: with IS_DECODE the lengths [num_tiles] of sequences with one query each; else [num_tiles, 4]: first
    row, queries, position of the first, row in the block table. items: [num_items >= num_tiles + target, 8].
    Runs as one program. TILES: num_tiles padded to a power of two.
    """
    tile = tl.arange(0, TILES)
    is_tile = tile < num_tiles
    if IS_DECODE:
        end = tl.load(tiles + tile, mask=is_tile, other=0).to(tl.int32)
        row = tile
        table_row = tile
        num_queries = is_tile.to(tl.int32)
        position = tl.maximum(end - 1, 0)
    else:
        row = tl.load(tiles + tile * 4, mask=is_tile, other=0).to(tl.int32)
        num_queries = tl.load(tiles + tile * 4 + 1, mask=is_tile, other=0).to(tl.int32)
        position = tl.load(tiles + tile * 4 + 2, mask=is_tile, other=0).to(tl.int32)
        table_row = tl.load(tiles + tile * 4 + 3, mask=is_tile, other=0).to(tl.int32)
        end = position + num_queries
    begin = tl.maximum(position + 1 - window, 0) // UNIT * UNIT
    units = tl.cdiv(end - begin, UNIT)
    count = is_tile.to(tl.int32)
    part_units = tl.maximum(units, 1)
    if CAN_SPLIT:
        # A part is a fair share of all keys, so there are at most `target` parts more than tiles. A context
        # up to half as long again stays whole, because adding up parts is not free.
        share = tl.maximum(tl.cdiv(tl.sum(units, 0), target), 1)
        count = tl.maximum((2 * units + share) // (2 * share), 1)
        part_units = tl.maximum(tl.cdiv(units, count), 1)
        count = tl.where(is_tile, tl.maximum(tl.cdiv(units, part_units), 1), 0)
    last = tl.cumsum(count, 0)
    first = last - count
    tl.store(parts + tile * 4, row, mask=is_tile)
    tl.store(parts + tile * 4 + 1, num_queries, mask=is_tile)
    tl.store(parts + tile * 4 + 2, first, mask=is_tile)
    tl.store(parts + tile * 4 + 3, count, mask=is_tile)
    for part in range(0, tl.max(count, 0)):
        item = items + (first + part) * 8
        is_part = part < count
        low = begin + part * part_units * UNIT
        tl.store(item, row, mask=is_part)
        tl.store(item + 1, num_queries, mask=is_part)
        tl.store(item + 2, position, mask=is_part)
        tl.store(item + 3, low, mask=is_part)
        tl.store(item + 4, tl.minimum(low + part_units * UNIT, end), mask=is_part)
        tl.store(item + 5, table_row, mask=is_part)
        tl.store(item + 6, (count > 1).to(tl.int32), mask=is_part)
    for base in range(0, num_items, TILES):
        item_index = base + tile
        is_unused = (item_index < num_items) & (item_index >= tl.sum(count, 0))
        tl.store(items + item_index * 8 + 1, 0, mask=is_unused)


@triton.jit
def _attend_keys(
    queries, best, total, acc, start, low, high, position, query, head, K, V, table, scaling, softcap, window,
    NUM_KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    IS_MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over keys start .. start + BLOCK_N - 1. queries: [BLOCK_M, KEY_PAD];
    best, total: [BLOCK_M], maximum and sum, with exponents to base 2; acc: [BLOCK_M, VALUE_PAD]; query:
    [BLOCK_M], index within the tile."""
    key = start + tl.arange(0, BLOCK_N)
    key_column = tl.arange(0, KEY_PAD)
    value_column = tl.arange(0, VALUE_PAD)
    is_key = (key >= low) & (key < high)
    if IS_MASKED:
        block = tl.load(table + key // PAGE, mask=is_key, other=0).to(tl.int64)
    else:
        block = tl.load(table + key // PAGE).to(tl.int64)
    place = (block * NUM_KV_HEADS + head) * PAGE + key % PAGE
    k_at = K + place[:, None] * KEY_DIM + key_column[None, :]
    v_at = V + place[:, None] * VALUE_DIM + value_column[None, :]
    if IS_MASKED:
        k = tl.load(k_at, mask=is_key[:, None] & (key_column < KEY_DIM)[None, :], other=0.0)
        v = tl.load(v_at, mask=is_key[:, None] & (value_column < VALUE_DIM)[None, :], other=0.0)
    elif (KEY_DIM == KEY_PAD) & (VALUE_DIM == VALUE_PAD):
        k = tl.load(k_at)
        v = tl.load(v_at)
    else:
        k = tl.load(k_at, mask=(key_column < KEY_DIM)[None, :], other=0.0)
        v = tl.load(v_at, mask=(value_column < VALUE_DIM)[None, :], other=0.0)
    scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
    if HAS_SOFTCAP:  # from here on the scores are in units of log2, for exp2
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (scaling * (2.0 * LOG2_E) / softcap)))
        scores = tanh * (softcap * LOG2_E)
    else:
        scores = scores * (scaling * LOG2_E)
    if IS_MASKED:
        age = (position + query)[:, None] - key[None, :]
        scores = tl.where(is_key[None, :] & (age >= 0) & (age < window), scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    shift = new_best
    if IS_MASKED:  # for a row that has seen no key yet, -inf - -inf would be NaN
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(best - shift)
    acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return new_best, total * keep + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=["table_stride", "window"])
def attend_items(
    q, K, V, out, part_out, part_stats, table, items, sinks,
    scaling, softcap, window, q_row_stride, q_head_stride, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    IS_DECODE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, CAN_SPLIT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One item for one KV head. Grid (Hkv, items), because the heads of a block lie side by side in memory.

    q: rows and heads at the given strides; out: [T, Hq, D_v]; part_out: [items, Hkv, ROWS, D_v], part_stats:
    [items, Hkv, ROWS, 2], both float32, ROWS = queries of a tile × GROUP <= BLOCK_M. Row m of the product is
    query m // GROUP, head m % GROUP of the group. sinks: [Hq], read with HAS_SINKS; for a tile in several
    parts `add_parts` adds them.
    """
    head = tl.program_id(0)
    item = tl.program_id(1)
    at = items + item * 8
    num_queries = tl.load(at + 1)
    if num_queries == 0:
        return
    first_row = tl.load(at)
    position = tl.load(at + 2)
    low = tl.load(at + 3)
    high = tl.load(at + 4)
    row_table = table + tl.load(at + 5).to(tl.int64) * table_stride

    m = tl.arange(0, BLOCK_M)
    query = m // GROUP
    is_row = query < num_queries
    row = (first_row + query).to(tl.int64)
    q_head = head * GROUP + m % GROUP
    key_column = tl.arange(0, KEY_PAD)
    value_column = tl.arange(0, VALUE_PAD)
    queries = tl.load(
        q + (row * q_row_stride + q_head * q_head_stride)[:, None] + key_column[None, :],
        mask=is_row[:, None] & (key_column < KEY_DIM)[None, :],
        other=0.0,
    )
    is_part = False
    if CAN_SPLIT:
        is_part = tl.load(at + 6) != 0
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    if HAS_SINKS:  # noqa: SIM102  this is decided at compile time, the other condition by the item
        if not is_part:
            best = tl.load(sinks + q_head).to(tl.float32) * LOG2_E
            total = tl.full([BLOCK_M], 1.0, tl.float32)
    if HAS_WINDOW:
        low = tl.maximum(low, position + 1 - window)
    start = low // BLOCK_N * BLOCK_N
    if not (IS_DECODE or HAS_WINDOW):  # keys that every query of the tile sees need no mask
        whole = tl.minimum(high, position + 1) // BLOCK_N * BLOCK_N
        for begin in range(start, whole, BLOCK_N):
            best, total, acc = _attend_keys(
                queries, best, total, acc, begin, low, high, position, query, head, K, V, row_table,
                scaling, softcap, window, NUM_KV_HEADS, KEY_DIM, VALUE_DIM, PAGE, BLOCK_N, KEY_PAD, VALUE_PAD,
                False, HAS_SOFTCAP,
            )  # fmt: skip
        start = tl.maximum(start, whole)
    for begin in range(start, high, BLOCK_N):
        best, total, acc = _attend_keys(
            queries, best, total, acc, begin, low, high, position, query, head, K, V, row_table,
            scaling, softcap, window, NUM_KV_HEADS, KEY_DIM, VALUE_DIM, PAGE, BLOCK_N, KEY_PAD, VALUE_PAD,
            True, HAS_SOFTCAP,
        )  # fmt: skip

    is_value = value_column < VALUE_DIM
    if is_part:
        part = (item.to(tl.int64) * NUM_KV_HEADS + head) * ROWS + m
        part_at = part_out + part[:, None] * VALUE_DIM + value_column[None, :]
        tl.store(part_at, acc, mask=is_row[:, None] & is_value[None, :])
        tl.store(part_stats + part * 2, best, mask=is_row)
        tl.store(part_stats + part * 2 + 1, total, mask=is_row)
    else:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_at = out + ((row * NUM_KV_HEADS * GROUP + q_head) * VALUE_DIM)[:, None] + value_column[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=is_row[:, None] & is_value[None, :])


@triton.jit
def add_parts(
    out, part_out, part_stats, parts, sinks,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, VALUE_PAD: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """The output of tiles that were cut into several items. Grid (Hkv * ROWS, tiles); arguments as above."""
    at = parts + tl.program_id(1) * 4
    num_items = tl.load(at + 3)
    if num_items <= 1:
        return
    head = tl.program_id(0) // ROWS
    m = tl.program_id(0) % ROWS
    query = m // GROUP
    if query >= tl.load(at + 1):
        return
    first = tl.load(at + 2).to(tl.int64)
    column = tl.arange(0, VALUE_PAD)
    is_value = column < VALUE_DIM
    best = float("-inf")
    total = 0.0
    if HAS_SINKS:
        best = tl.load(sinks + head * GROUP + m % GROUP).to(tl.float32) * LOG2_E
        total = 1.0
    acc = tl.zeros([VALUE_PAD], tl.float32)
    for start in range(0, num_items, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        is_item = index < num_items
        part = ((first + index) * NUM_KV_HEADS + head) * ROWS + m
        part_best = tl.load(part_stats + part * 2, mask=is_item, other=float("-inf"))
        part_total = tl.load(part_stats + part * 2 + 1, mask=is_item, other=0.0)
        values_at = part_out + part[:, None] * VALUE_DIM + column[None, :]
        values = tl.load(values_at, mask=is_item[:, None] & is_value[None, :], other=0.0)
        new_best = tl.maximum(best, tl.max(part_best, 0))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(part_best - shift)
        keep = tl.exp2(best - shift)
        total = total * keep + tl.sum(part_total * weight, 0)
        acc = acc * keep + tl.sum(values * weight[:, None], 0)
        best = new_best
    row = (tl.load(at) + query).to(tl.int64)
    out_at = out + (row * NUM_KV_HEADS * GROUP + head * GROUP + m % GROUP) * VALUE_DIM + column
    tl.store(out_at, (acc / tl.where(total == 0.0, 1.0, total)).to(out.dtype.element_ty), mask=is_value)


@triton.jit(do_not_specialize_on_alignment=["blocks", "offsets"])
def keep_kv(
    K, V, k, v, blocks, offsets, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    NUM_KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
    HEADS_PAD: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """K[blocks[t], :, offsets[t]] = k[t], and likewise V. Grid (T). Block 0, the null block, is not
    written."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.load(blocks + token).to(tl.int64)
    if block == 0:
        return
    head = tl.arange(0, HEADS_PAD)
    key_column = tl.arange(0, KEY_PAD)
    value_column = tl.arange(0, VALUE_PAD)
    place = (block * NUM_KV_HEADS + head) * PAGE + tl.load(offsets + token)
    is_key = (head < NUM_KV_HEADS)[:, None] & (key_column < KEY_DIM)[None, :]
    is_value = (head < NUM_KV_HEADS)[:, None] & (value_column < VALUE_DIM)[None, :]
    k_at = k + token * k_row_stride + head[:, None] * k_head_stride + key_column[None, :]
    v_at = v + token * v_row_stride + head[:, None] * v_head_stride + value_column[None, :]
    key = tl.load(k_at, mask=is_key, other=0.0)
    tl.store(K + place[:, None] * KEY_DIM + key_column[None, :], key, mask=is_key)
    value = tl.load(v_at, mask=is_value, other=0.0)
    tl.store(V + place[:, None] * VALUE_DIM + value_column[None, :], value, mask=is_value)
