"""Ids of tokens that the host does not know yet: the step before sampled them, and they are on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.kv.transfer import Ints
from service.engine.scheduling.plan import Chunk
from service.engine.scheduling.request import PENDING, EngineRequest


@dataclass(frozen=True)
class SampledTokens:
    """What a step sampled: tokens int64 [n], on the device, for these requests."""

    tokens: Tensor
    requests: Sequence[EngineRequest]


@dataclass(frozen=True)
class TokenSources:
    """rows: int64 [T], for every token of a step its row in `tokens`; 0 where the host knows it. tokens:
    int64 [n] on the device."""

    rows: Ints
    tokens: Tensor

    def fill_in(self, input_ids: Tensor, rows: Tensor) -> Tensor:
        """The ids, complete. input_ids: int64 [T], PENDING where unknown; rows: `self.rows` on the device."""
        return torch.where(input_ids == PENDING, self.tokens.index_select(0, rows), input_ids)


def find_sources(chunks: Sequence[Chunk], sampled: SampledTokens | None) -> TokenSources | None:
    """Where the pending tokens of a step come from; None if it has none."""
    pending = [chunk.is_pending for chunk in chunks]
    if True not in pending:
        return None
    assert sampled is not None
    if chunks[-1].length == 1 and [chunk.request for chunk in chunks] == sampled.requests:
        return TokenSources(np.arange(len(chunks)), sampled.tokens)  # all decode on, the usual step
    row_of = {id(request): row for row, request in enumerate(sampled.requests)}
    rows = np.zeros(sum(chunk.length for chunk in chunks), np.int64)
    last = -1
    for chunk, is_pending in zip(chunks, pending, strict=True):
        last += chunk.length
        if is_pending:
            rows[last] = row_of[id(chunk.request)]
    return TokenSources(rows, sampled.tokens)
