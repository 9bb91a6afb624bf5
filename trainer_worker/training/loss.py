"""The loss of the tokens to learn, and of no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trainer_worker.training.data import MicroBatch


def token_losses(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """-log p of each token to learn, float32 or wider [N], and whether it was the most likely one, bool [N].

    The output head sees only the N hidden states that predict a token to learn: with a vocabulary of 128,000
    the logits of the others would be the largest tensor of the step. A hook in front of the head selects
    them, so that what the model does to its logits afterwards (soft caps, scales) is done to these.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)

    def select(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        hidden: Tensor = inputs[0]  # [S, L, d]
        return (hidden.flatten(0, 1).index_select(0, batch.positions)[None],)

    hook = head.register_forward_pre_hook(select)
    try:
        logits = model(input_ids=batch.token_ids, use_cache=False).logits[0]  # [N, V]
    finally:
        hook.remove()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        is_correct = logits.argmax(-1) == batch.targets
    return F.cross_entropy(logits, batch.targets, reduction="none"), is_correct
