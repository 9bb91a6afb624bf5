"""Turn a plan into tensors: everything that the model, the attention and the sampler read of a step.

All small integers of a step go to the device in one copy. Rows of the batch are tokens, in the order of the
plan's chunks; chunks of one token come first and attend together. The ids of pending tokens are not known to
the host yet: the step before sampled them, and they are taken on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.attention.reference import AttentionLayout, AttentionStep, TokenRows
from service.engine.kv.cache import PagedKV
from service.engine.kv.memory import Ints, upload
from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.request import PENDING, EngineRequest


@dataclass(frozen=True)
class SampledTokens:
    """The tokens that a step sampled."""

    #: int64 [n], on the device.
    tokens: Tensor
    #: The requests to which they belong.
    requests: Sequence[EngineRequest]


@dataclass(frozen=True)
class TokenSources:
    """Where the pending tokens of a step come from."""

    #: int64 [T], the row of every token of the step in `tokens`; 0 if the host knows the token.
    rows: Ints
    #: int64 [n], on the device.
    tokens: Tensor

    def fill_in(self, input_ids: Tensor, rows: Tensor) -> Tensor:
        """Return the complete ids. input_ids: int64 [T], PENDING where unknown; rows: `self.rows` on the
        device."""
        return torch.where(input_ids == PENDING, self.tokens.index_select(0, rows), input_ids)


def find_sources(chunks: Sequence[Chunk], sampled: SampledTokens | None) -> TokenSources | None:
    """Return the sources of the pending tokens of a step; None if it has none."""
    pending = [chunk.is_pending for chunk in chunks]
    if True not in pending:
        return None
    assert sampled is not None
    if chunks[-1].length == 1 and [chunk.request for chunk in chunks] == sampled.requests:
        return TokenSources(np.arange(len(chunks)), sampled.tokens)  # all continue to decode: the usual step
    row_of = {id(request): row for row, request in enumerate(sampled.requests)}
    rows = np.zeros(sum(chunk.length for chunk in chunks), np.int64)
    last = -1
    for chunk, is_pending in zip(chunks, pending, strict=True):
        last += chunk.length
        if is_pending:
            rows[last] = row_of[id(chunk.request)]
    return TokenSources(rows, sampled.tokens)


@dataclass(frozen=True)
class StepBatch:
    """The tensors of one step, all int64 on the model's device."""

    rows: TokenRows
    attention: AttentionStep
    #: Rows whose logits are needed: first those that sample their next token, then those that are scored
    #: against a prompt token, then those whose hidden state is classified.
    logit_rows: Tensor
    #: [P], the prompt tokens that the latter are scored against.
    prompt_targets: Tensor
    #: [n]
    fresh_blocks: Tensor
    #: The slots of all tokens, [T], for each basis that has adapter rows.
    slots: dict[str, Tensor]


def build_batch(
    plan: StepPlan,
    kv: PagedKV,
    layout: AttentionLayout,
    device: torch.device,
    sources: TokenSources | None = None,
) -> StepBatch:
    """Return the batch of a step. sources: of its pending tokens, if it has any."""
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
    """Position and block of every token, int64 [T] each. Without a loop over tokens, since prompts are
    long."""
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
    """Return for each basis that the step needs the slot of every row: 0 for rows of other bases and the base
    model."""
    basis_ids = [chunk.request.basis_id for chunk in chunks]
    lengths = [chunk.length for chunk in chunks]
    return {
        basis_id: np.repeat(
            [c.request.slot if own == basis_id else 0 for c, own in zip(chunks, basis_ids, strict=True)],
            lengths,
        )
        for basis_id in dict.fromkeys(basis_ids)
        if basis_id is not None
    }


def _logit_rows(chunks: Sequence[Chunk], starts: Sequence[int]) -> tuple[list[int], list[int]]:
    """`StepBatch.logit_rows` and `prompt_targets`."""
    rows = [end - 1 for chunk, end in zip(chunks, starts[1:], strict=True) if chunk.samples]
    targets = []
    for chunk, start in zip(chunks, starts[:-1], strict=True):
        for position in chunk.prompt_positions:
            rows.append(start + position - chunk.start)
            targets.append(chunk.request.token_ids[position + 1])
    rows += [end - 1 for chunk, end in zip(chunks, starts[1:], strict=True) if chunk.classifies]
    return rows, targets
