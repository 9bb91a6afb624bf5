"""Judges answers: their loss, and whether the greedy answer is the reference, token for token.

A greedy answer equals the reference exactly if every token of the reference, the end of the turn included, is
the most likely one after the tokens before it. One pass over the reference shows that, so nothing needs to be
generated. (A greedy answer of the same text in other tokens counts as wrong; it has not been seen.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tessera.chat.chat_format import EncodedExample
from trainer_worker.data.training_data import GPU_MIN_TOKENS, micro_batches
from trainer_worker.training.trainer import token_losses

#: Puts what was trained into the model, for rows [S] of these owners.
Attach = Callable[[Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class Score:
    """The answers of one run on one set."""

    #: Nats per token to learn.
    loss: float
    #: Answers whose every token is the most likely one.
    num_exact: int
    num_answers: int

    @property
    def exact(self) -> float:
        return self.num_exact / self.num_answers


@torch.no_grad()
def judge(
    model: PreTrainedModel,
    attach: Attach,
    sets: Sequence[tuple[int, Sequence[EncodedExample]]],
    *,
    token_budget: int,
) -> list[Score]:
    """Score each (owner, rows) of `sets`. Each row is one answer, and no set is empty.

    Owner and row make a pair; pairs of all sets share the passes through the model.
    """
    pairs = [(owner, row) for owner, rows in sets for row in rows]
    device = model.device
    owners = torch.tensor([owner for owner, _ in pairs], device=device)
    totals = torch.zeros(2, len(pairs), dtype=torch.float64, device=device)  # loss, correct tokens
    items = [(pair, row) for pair, (_, row) in enumerate(pairs)]
    min_tokens = 0 if device.type == "cpu" else GPU_MIN_TOKENS
    for batch in micro_batches(items, token_budget=token_budget, min_tokens=min_tokens):
        batch = batch.to(device)
        with attach(owners[batch.rows]):
            losses, is_correct = token_losses(model, batch)
        totals.index_add_(1, batch.owners, torch.stack([losses, is_correct]).double())
    totals = totals.cpu()
    scores, first = [], 0
    for _, rows in sets:
        mine = slice(first, first + len(rows))
        num_tokens = torch.tensor([row.num_loss_tokens for row in rows], dtype=torch.float64)
        losses, num_correct = totals[:, mine]
        num_exact = int((num_correct == num_tokens).sum())
        scores.append(Score(float(losses.sum() / num_tokens.sum()), num_exact, len(rows)))
        first += len(rows)
    return scores
