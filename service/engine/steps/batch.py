"""From a plan to tensors: everything that the model, the attention and the sampler read of a step.

All small integers of a step travel to the device in one copy. Rows of the batch are tokens, in the order of
the plan's chunks; those of one token come first and attend together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.attention.layout import AttentionLayout
from service.engine.attention.reference import AttentionStep, TokenRows
from service.engine.kv.cache import PagedKV
from service.engine.kv.transfer import Ints, upload
from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.steps.token_sources import TokenSources


@dataclass(frozen=True)
class StepBatch:
    """The tensors of one step, all int64 on the model's device.

    logit_rows: rows whose logits are wanted, first those whose next token is sampled, then those that are
    scored against a prompt token; prompt_targets: [P], these tokens. fresh_blocks: [n]. slots: [T] per basis
    with adapter rows.
    """

    rows: TokenRows
    attention: AttentionStep
    logit_rows: Tensor
    prompt_targets: Tensor
    fresh_blocks: Tensor
    slots: dict[str, Tensor]


def build_batch(
    plan: StepPlan,
    kv: PagedKV,
    layout: AttentionLayout,
    device: torch.device,
    sources: TokenSources | None = None,
) -> StepBatch:
    """sources: of the ids that are not known to the host yet."""
    chunks, block_size = plan.chunks, kv.block_size
    starts = list(itertools.accumulate((chunk.length for chunk in chunks), initial=0))
    token_ids = list(itertools.chain.from_iterable(c.request.token_ids[c.start : c.end] for c in chunks))
    positions, blocks = _places(chunks, block_size)
    logit_rows, targets = _logit_rows(chunks, starts)
    slots = _slots(chunks)
    arrays, make_attention = layout.lay_out(chunks, block_size)
    pieces = upload(
        [
            np.asarray(token_ids),
            positions,
            blocks,
            positions % block_size,
            np.asarray(logit_rows, np.int64),
            np.asarray(targets, np.int64),
            np.asarray(plan.fresh_blocks, np.int64),
            np.empty(0, np.int64) if sources is None else sources.rows,
            *slots.values(),
            *arrays,
        ],
        device,
    )
    input_ids, *places = pieces[:4]
    if sources is not None:
        input_ids = sources.fill_in(input_ids, pieces[7])
    rows = TokenRows(input_ids, *places)
    rest = pieces[8:]
    return StepBatch(
        rows=rows,
        attention=make_attention(kv, rows, rest[len(slots) :]),
        logit_rows=pieces[4],
        prompt_targets=pieces[5],
        fresh_blocks=pieces[6],
        slots=dict(zip(slots, rest, strict=False)),
    )


def _places(chunks: Sequence[Chunk], block_size: int) -> tuple[Ints, Ints]:
    """Position and block of every token, int64 [T] each. Chunks of prompts are long: no loop over tokens."""
    num_single = sum(chunk.length == 1 for chunk in chunks)
    single, long = chunks[:num_single], chunks[num_single:]
    positions = [np.asarray([chunk.start for chunk in single], np.int64)]
    blocks = [np.asarray([c.request.blocks[c.start // block_size] for c in single], np.int64)]
    for chunk in long:
        own = np.arange(chunk.start, chunk.end)
        positions.append(own)
        first = chunk.start // block_size
        held = np.asarray(chunk.request.blocks[first : -(-chunk.end // block_size)])
        blocks.append(held[own // block_size - first])
    return np.concatenate(positions), np.concatenate(blocks)


def _slots(chunks: Sequence[Chunk]) -> dict[str, Ints]:
    """Per basis that the step needs, every row's slot: 0 for rows of other bases and of the base model."""
    basis_ids = [chunk.request.adapter.basis_id if chunk.request.adapter else None for chunk in chunks]
    lengths = [chunk.length for chunk in chunks]
    return {
        wanted: np.repeat(
            [c.request.slot if own == wanted else 0 for c, own in zip(chunks, basis_ids, strict=True)],
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
            targets.append(chunk.request.token_ids[position + 1])
    return rows, targets
