"""Log-probabilities to report, of the model's own distribution: before temperature, penalties and bias.

They are computed on the device when a step is launched, and read together with its results, because a read
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.engine.wire.messages import TokenLogprobs

#: Rows that are turned into float32 log-probabilities at once: 32 MB with a vocabulary of 128 Ki.
_ROWS_AT_ONCE = 64


class PendingLogprobs:
    """Return for each row the log-probability of its token and of its `num_top` most likely tokens.

    logits: [N, V], any dtype;  token_ids: int64 [N]. Neither is kept.
    """

    def __init__(self, logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> None:
        self._counts = [min(count, logits.shape[-1]) for count in num_top]
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for start in range(0, len(logits), _ROWS_AT_ONCE):
            end = min(start + _ROWS_AT_ONCE, len(logits))
            logprobs = logits[start:end].float().log_softmax(-1)
            chosen_ids = token_ids[start:end]
            chosen = logprobs.gather(1, chosen_ids[:, None])[:, 0]
            top_values, top_ids = logprobs.topk(max(self._counts[start:end]))
            self._parts.append((chosen_ids, chosen, top_ids, top_values))

    def reports(self) -> list[TokenLogprobs]:
        """Return one report per row. Waits for the device."""
        rows = [
            row for part in self._parts for row in zip(*(column.tolist() for column in part), strict=True)
        ]
        return [
            TokenLogprobs(token_id, logprob, list(zip(ids[:count], values[:count], strict=True)))
            for (token_id, logprob, ids, values), count in zip(rows, self._counts, strict=True)
        ]


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Return the reports of `PendingLogprobs`, at once."""
    return PendingLogprobs(logits, token_ids, num_top).reports()
