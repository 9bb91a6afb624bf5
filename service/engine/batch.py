"""From a plan to tensors: everything that the model, the attention and the sampler read of a step.

All small integers of a step travel to the device in one copy. Rows of the batch are tokens, in the order of
the plan's chunks; those of one token come first and attend together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.engine.attention import AttentionTile
from service.engine.blocks import NULL_BLOCK
from service.engine.plan import Chunk, StepPlan

Ints = npt.NDArray[np.int64]

#: Tables up to this many blocks are not split for the sake of shorter sequences among them.
_SMALL_TABLE = 8


@dataclass(frozen=True)
class TileLimits:
    """Bound the memory of an attention tile. keys: gathered at once; 64 Ki tokens are 256 MB of K and V at 8B
    geometry in bfloat16. scores: queries × keys of one head; 2 Mi are 256 MB at 32 heads in float32."""

    keys: int = 64 * 1024
    scores: int = 2 * 1024 * 1024


@dataclass(frozen=True)
class StepBatch:
    """The tensors of one step, all int64 on the model's device.

    input_ids, positions: [1, T]. blocks, offsets: [T], where the KV of each token belongs. logit_rows: rows
    whose logits are wanted, first those whose next token is sampled, then those that are scored against a
    prompt token; prompt_targets: [P], these tokens. fresh_blocks: [n]. slots: [T] per basis with adapter
    rows.
    """

    input_ids: Tensor
    positions: Tensor
    blocks: Tensor
    offsets: Tensor
    logit_rows: Tensor
    prompt_targets: Tensor
    fresh_blocks: Tensor
    tiles: list[AttentionTile]
    slots: dict[str, Tensor]


def build_batch(
    plan: StepPlan, block_size: int, device: torch.device, limits: TileLimits = TileLimits()
) -> StepBatch:
    chunks = plan.chunks
    starts = list(itertools.accumulate((chunk.length for chunk in chunks), initial=0))
    token_ids = [token for chunk in chunks for token in chunk.sequence.token_ids[chunk.start : chunk.end]]
    positions = np.asarray([position for chunk in chunks for position in range(chunk.start, chunk.end)])
    blocks = [c.sequence.blocks[position // block_size] for c in chunks for position in range(c.start, c.end)]
    rows, targets = _logit_rows(chunks, starts)
    tiles = list(_tiles(chunks, starts, block_size, limits))
    slots = _slots(chunks)
    pieces = iter(
        upload(
            [
                np.asarray([token_ids]),
                positions[None],
                np.asarray(blocks),
                positions % block_size,
                np.asarray(rows, np.int64),
                np.asarray(targets, np.int64),
                np.asarray(plan.fresh_blocks, np.int64),
                *(array for _, table, queries in tiles for array in (table, queries)),
                *slots.values(),
            ],
            device,
        )
    )
    return StepBatch(
        input_ids=next(pieces),
        positions=next(pieces),
        blocks=next(pieces),
        offsets=next(pieces),
        logit_rows=next(pieces),
        prompt_targets=next(pieces),
        fresh_blocks=next(pieces),
        tiles=[AttentionTile(start, next(pieces), next(pieces)) for start, _, _ in tiles],
        slots={basis_id: next(pieces) for basis_id in slots},
    )


def upload(arrays: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """The arrays on the device, as int64 views of one tensor that was copied at once."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    pieces = torch.split(flat, [array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def _slots(chunks: Sequence[Chunk]) -> dict[str, Ints]:
    """Per basis that the step needs, every row's slot: 0 for rows of other bases and of the base model."""
    basis_ids = [chunk.sequence.adapter.basis_id if chunk.sequence.adapter else None for chunk in chunks]
    lengths = [chunk.length for chunk in chunks]
    return {
        wanted: np.repeat(
            [c.sequence.slot if own == wanted else 0 for c, own in zip(chunks, basis_ids, strict=True)],
            lengths,
        )
        for wanted in dict.fromkeys(basis_ids)
        if wanted is not None
    }


def _logit_rows(chunks: Sequence[Chunk], starts: Sequence[int]) -> tuple[list[int], list[int]]:
    """`StepBatch.logit_rows` and `prompt_targets`."""
    rows = [end - 1 for chunk, end in zip(chunks, starts[1:], strict=True) if chunk.samples]
    targets = []
    for chunk, start in zip(chunks, starts[:-1], strict=True):
        for position in chunk.prompt_positions:
            rows.append(start + position - chunk.start)
            targets.append(chunk.sequence.token_ids[position + 1])
    return rows, targets


def _tiles(
    chunks: Sequence[Chunk], starts: Sequence[int], block_size: int, limits: TileLimits
) -> Iterator[tuple[int, Ints, Ints]]:
    """First row, block table and positions of each tile."""
    num_single = sum(chunk.length == 1 for chunk in chunks)
    tables = [chunk.sequence.blocks[: -(-chunk.end // block_size)] for chunk in chunks]
    for first, last in _groups([len(table) for table in tables[:num_single]], limits.keys // block_size):
        padded = np.full((last - first, len(tables[first])), NULL_BLOCK, np.int64)
        for index, table in enumerate(tables[first:last]):
            padded[index, : len(table)] = table
        yield first, padded, np.asarray([[chunk.start] for chunk in chunks[first:last]], np.int64)
    for chunk, table, row in zip(
        chunks[num_single:], tables[num_single:], starts[num_single:-1], strict=True
    ):
        step = max(1, limits.scores // (len(table) * block_size))
        for start in range(chunk.start, chunk.end, step):
            end = min(start + step, chunk.end)
            visible = np.asarray([table[: -(-end // block_size)]], np.int64)
            yield row + start - chunk.start, visible, np.arange(start, end, dtype=np.int64)[None]


def _groups(num_blocks: Sequence[int], max_blocks: int) -> Iterator[tuple[int, int]]:
    """Runs of sequences, given longest first, that attend in one tile: within its memory, and none of them
    less than half as long as the first, or most of what is gathered would be padding."""
    first = 0
    for index, count in enumerate(num_blocks):
        longest = num_blocks[first]
        is_too_short = longest > _SMALL_TABLE and 2 * count < longest
        if is_too_short or (index > first and (index + 1 - first) * longest > max_blocks):
            yield first, index
            first = index
    if num_blocks:
        yield first, len(num_blocks)
