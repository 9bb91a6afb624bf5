"""What a request asks to be changed in the model's logits before a token is chosen.

In this order, each in float32 and each on its own row only:

    repetition   z[v] = z[v] / p if z[v] > 0 else z[v] * p   for v in prompt or output (arXiv 1909.05858)
    frequency    z[v] -= f * (times v occurs in the output)
    presence     z[v] -= p * (v occurs in the output)
    bias         z[v] += bias[v]
    min_tokens   z[v] = -inf for the stop tokens, while the output is shorter
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from service.engine.scheduling.request import Sequence


def apply_rules(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """The logits that tokens are chosen from. logits: float32 [N, V]; a copy is returned if a row has
    rules."""
    ruled = [index for index, sequence in enumerate(sequences) if has_rules(sequence)]
    if not ruled:
        return logits
    logits = logits.clone()
    for index in ruled:
        _apply_to_row(logits[index], sequences[index])
    return logits


def has_rules(sequence: Sequence) -> bool:
    """Whether its logits are changed, which may take its own last token."""
    return sequence.has_rules or _must_go_on(sequence)


def _must_go_on(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return (
        sampling.min_tokens > 0
        and sequence.num_output < sampling.min_tokens
        and bool(sampling.stop_token_ids)
    )


def _apply_to_row(row: Tensor, sequence: Sequence) -> None:
    """row: [V], changed in place."""
    sampling, counts = sequence.sampling, sequence.output_counts
    if sampling.repetition_penalty != 1:
        seen = _ids(row, sequence.prompt_set.union(counts))
        values = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if counts and (sampling.frequency_penalty != 0 or sampling.presence_penalty != 0):
        times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        row[_ids(row, counts)] -= sampling.frequency_penalty * times + sampling.presence_penalty
    if sampling.logit_bias:
        bias = torch.tensor(list(sampling.logit_bias.values()), device=row.device, dtype=row.dtype)
        row[_ids(row, sampling.logit_bias)] += bias
    if _must_go_on(sequence):
        row[_ids(row, [token for token in sampling.stop_token_ids if token < len(row)])] = float("-inf")


def _ids(row: Tensor, token_ids: Rows[int] | frozenset[int] | dict[int, float] | dict[int, int]) -> Tensor:
    return torch.tensor(list(token_ids), device=row.device, dtype=torch.int64)
