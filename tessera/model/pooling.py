"""The one state of a text that a classification head reads, as transformers' own classes pool it.

causal model    the state of the text's last token after the final norm, which the output head reads
encoder         what the last linear layer of its class for sequence classification reads: the first
                token's state behind the pooler that the architecture has
"""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tessera.errors import UnsupportedModel
from tessera.model.encoders import ENCODERS, Encoder


class HeadInput:
    """While it is entered, notes what the output head of `model` reads.

    rows: int64 [n], rows of the flattened input of the head [S · L, d]; the head gets these alone, so that no
    other logits are computed. None leaves the input as it is. Raises `UnsupportedModel` if the model has no
    output head.
    """

    def __init__(self, model: PreTrainedModel, *, rows: Tensor | None = None) -> None:
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise UnsupportedModel(
                f"{type(model).__name__} has no output head, so its last hidden state is not known",
                param="base_model",
            )
        self._head, self._rows = head, rows
        self._states: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def take(self) -> Tensor:
        """Return the last input of the head, and forget it."""
        states, self._states = self._states, None
        assert states is not None, "the model has not called its output head"
        return states

    def __enter__(self) -> Self:
        self._hook = self._head.register_forward_pre_hook(self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._hook is not None
        self._hook.remove()

    def _note(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
        states: Tensor = inputs[0]
        if self._rows is None:
            self._states = states
            return None
        self._states = states.flatten(0, -2).index_select(0, self._rows)
        return (self._states[None],)


def hidden_width(model: PreTrainedModel) -> int | None:
    """Return d, the width of the pooled state; None if the model has no output head to read it."""
    if encoder_of(model) is not None:
        return int(model.config.hidden_size)
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return None
    return int(weight.shape[1])


def pooled_states(
    model: PreTrainedModel, token_ids: Tensor, lengths: Tensor, first_lengths: Tensor | None = None
) -> Tensor:
    """Return the pooled states [S, d] of texts, which are padded on the right.

    token_ids: int64 [S, L]. lengths: int64 [S]. first_lengths: int64 [S], the tokens of the first of two
    texts, 0 for a single one; for encoders that tell the two apart.
    """
    num_rows, longest = token_ids.shape
    encoder = encoder_of(model)
    if encoder is None:  # under causal attention no real token sees the padding
        last = torch.arange(num_rows, device=token_ids.device) * longest + lengths - 1
        with HeadInput(model, rows=last) as head_input:
            model(input_ids=token_ids, use_cache=False)
        return head_input.take()
    places = torch.arange(longest, device=token_ids.device)
    mask = places < lengths[:, None]
    options = {"attention_mask": mask.long()}
    if first_lengths is not None and encoder.has_token_types:
        is_second = (first_lengths[:, None] > 0) & (places >= first_lengths[:, None]) & mask
        options["token_type_ids"] = is_second.long()
    # RoBERTa counts positions by the tokens that are not padding.
    token_ids = torch.where(mask, token_ids, model.config.pad_token_id or 0)
    pooled: Tensor = model(input_ids=token_ids, **options).logits
    return pooled


def encoder_of(model: nn.Module) -> Encoder | None:
    """Return the architecture of a model that `strip_head` has prepared or can prepare; None for others."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None
    assert isinstance(model, PreTrainedModel)
    return ENCODERS.get(model.config.model_type)


def is_replaced(name: str, encoder: Encoder) -> bool:
    """Whether a weight that a checkpoint lacks is one that `strip_head` replaces."""
    modules = (encoder.head, *encoder.pooler, "head.norm")
    return any(name.startswith(f"{module}.") for module in modules)


@torch.no_grad()
def strip_head(model: PreTrainedModel, encoder: Encoder, *, missing: Collection[str]) -> None:
    """Make the "logits" of a model for sequence classification its pooled states.

    missing: the weights that its checkpoint lacks. A layer of the pooler among them becomes the identity:
    transformers would fill it with random numbers, which differ at every start.
    """
    parent, _, child = encoder.head.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    for name in encoder.pooler:
        if f"{name}.weight" in missing:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(torch.eye(*layer.weight.shape))
            if layer.bias is not None:
                layer.bias.zero_()
