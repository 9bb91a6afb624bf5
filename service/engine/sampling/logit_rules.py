"""What a request asks to be changed in the model's logits before a token is chosen.

In this order, each in float32 and each on its own row only:

    repetition   z[v] = z[v] / p if z[v] > 0 else z[v] * p   for v in prompt or output (arXiv 1909.05858)
    frequency    z[v] -= f * (times v occurs in the output)
    presence     z[v] -= p * (v occurs in the output)
    bias         z[v] += bias[v]
    min_tokens   z[v] = -inf for the stop tokens, while the output is shorter
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.scheduling.request import EngineRequest


def apply_rules(logits: Tensor, requests: Sequence[EngineRequest]) -> Tensor:
    """The logits that tokens are chosen from. logits: float32 [N, V]; a copy is returned if a row has
    rules."""
    ruled = [index for index, request in enumerate(requests) if has_rules(request)]
    if not ruled:
        return logits
    logits = logits.clone()
    for index in ruled:
        _apply_to_row(logits[index], requests[index])
    return logits


def has_rules(request: EngineRequest) -> bool:
    """Whether its logits are changed, which may take its own last token."""
    return request.has_rules or _must_go_on(request)


def _must_go_on(request: EngineRequest) -> bool:
    sampling = request.sampling
    return (
        sampling.min_tokens > 0 and request.num_output < sampling.min_tokens and bool(sampling.stop_token_ids)
    )


def _apply_to_row(row: Tensor, request: EngineRequest) -> None:
    """row: [V], changed in place."""
    sampling, counts = request.sampling, request.output_counts
    if sampling.repetition_penalty != 1:
        seen = _ids(row, request.prompt_set.union(counts))
        values = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if counts and (sampling.frequency_penalty != 0 or sampling.presence_penalty != 0):
        times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        row[_ids(row, counts)] -= sampling.frequency_penalty * times + sampling.presence_penalty
    if sampling.logit_bias:
        bias = torch.tensor(list(sampling.logit_bias.values()), device=row.device, dtype=row.dtype)
        row[_ids(row, sampling.logit_bias)] += bias
    if _must_go_on(request):
        row[_ids(row, [token for token in sampling.stop_token_ids if token < len(row)])] = float("-inf")


def _ids(
    row: Tensor, token_ids: Sequence[int] | frozenset[int] | dict[int, float] | dict[int, int]
) -> Tensor:
    return torch.tensor(list(token_ids), device=row.device, dtype=torch.int64)
