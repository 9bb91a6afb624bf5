"""Log-probabilities to report: of the model's own distribution, before temperature, penalties and bias."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from service.engine.messages import TokenLogprobs

#: Rows turned into float32 log-probabilities at once: 32 MB at a vocabulary of 128 Ki.
_ROWS_AT_ONCE = 64


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: Rows[int]) -> list[TokenLogprobs]:
    """For each row the log-probability of its token and of its `num_top` most likely ones.

    logits: [N, V], any dtype;  token_ids: int64 [N].
    """
    reports: list[TokenLogprobs] = []
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, len(logits))
        logprobs = logits[start:end].float().log_softmax(-1)
        chosen_ids = token_ids[start:end]
        chosen = logprobs.gather(1, chosen_ids[:, None])[:, 0]
        counts = [min(count, logits.shape[-1]) for count in num_top[start:end]]
        top_values, top_ids = logprobs.topk(max(counts))
        columns = (chosen_ids.tolist(), chosen.tolist(), top_ids.tolist(), top_values.tolist(), counts)
        for token_id, logprob, ids, values, count in zip(*columns, strict=True):
            top = list(zip(ids[:count], values[:count], strict=True))
            reports.append(TokenLogprobs(token_id, logprob, top))
    return reports


def finite_rows(logits: Tensor) -> Tensor:
    """Which rows hold only finite numbers: bool [N]. logits: [N, V]."""
    low, high = torch.aminmax(logits, dim=-1)  # both are NaN if anything is; one pass, no mask of [N, V]
    return torch.isfinite(low) & torch.isfinite(high)
