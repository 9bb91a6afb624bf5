"""The hidden state that a causal model's output head reads: the input of a classification head.

It is the state after the final norm, which transformers' `…ForSequenceClassification` classes read as well.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tessera.errors import UnsupportedModel


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
    """Return d, the width of the state that the output head reads; None if the model has no such head."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return None
    return int(weight.shape[1])
