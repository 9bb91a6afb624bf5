"""The loss of calibration examples under the frozen model, with or without an adapter.

The loss of an example is the mean over its tokens to learn; the loss of a set is the mean over its examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.errors import InvalidInput
from tessera.formats.basis import Basis
from tessera.methods.building.calibration import CalibrationBatch, CalibrationSet
from tessera.model.base_model import BaseModel


def check_fits(base: BaseModel, calibration: CalibrationSet) -> None:
    """Raise `InvalidInput`, which names the first example that is too long or has unknown tokens."""
    size = int(base.model.config.get_text_config().vocab_size)
    for index, (token_ids, _) in enumerate(calibration.examples):
        if len(token_ids) > base.max_position:
            raise InvalidInput(
                f"calibration example {index} has {len(token_ids)} tokens, more than the {base.max_position} "
                "that the base model reads",
                param="calibration",
            )
        if not (min(token_ids) >= 0 and max(token_ids) < size):
            bad = next(token for token in token_ids if not 0 <= token < size)
            raise InvalidInput(
                f"calibration example {index} holds token {bad}, the vocabulary has {size}",
                param="calibration",
            )


def example_losses(base: BaseModel, batch: CalibrationBatch) -> Tensor:
    """Return -(1/T_i) Σ_t log p(token t of row i), float32 or float64 [S]; 0 for a row with nothing to learn.

    The output head computes only the positions that predict a token to learn. Raises `InvalidInput`, which
    names the example, for a loss that is not finite.
    """
    rows, columns = batch.labels.nonzero(as_tuple=True)
    logits = _logits(base, batch, rows * batch.labels.shape[1] + columns - 1)
    token_losses = F.cross_entropy(logits, batch.token_ids[rows, columns], reduction="none")
    weights = 1 / batch.label_counts.clamp_min(1).to(token_losses)
    losses = torch.zeros_like(weights).index_add(0, rows, token_losses * weights[rows])
    _check_losses(losses, batch)
    return losses


def run_forward(base: BaseModel, batch: CalibrationBatch) -> None:
    """Run only the forward pass, for hooks that read activations."""
    _logits(base, batch, torch.zeros(1, dtype=torch.int64, device=batch.token_ids.device))


@torch.no_grad()
def mean_loss(base: BaseModel, calibration: CalibrationSet) -> float:
    """Return the mean loss of the labelled examples, in one forward pass. Raises `InvalidInput`."""
    labelled = calibration.labelled()
    total = sum(float(example_losses(base, batch.to(base.device)).sum()) for batch in labelled.batches())
    return total / len(labelled)


@contextmanager
def attached(base: BaseModel, basis: Basis, core: Tensor) -> Iterator[None]:
    """Within this context every target module adds B core[i] A x. core: [M, r, r], as it is served."""
    handles = []
    try:
        for index, shape in enumerate(basis.manifest.modules):
            linear = base.model.get_submodule(shape.name)
            A, B = basis.A[index].to(base.device), basis.B[index].to(base.device)
            left = (B.float() @ core[index].to(base.device).float()).to(B)
            handles.append(linear.register_forward_hook(_Addition(A, left)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Addition:
    """A forward hook that returns output + (x Aᵀ) (B core)ᵀ. left: B core [d_out, r]."""

    def __init__(self, A: Tensor, left: Tensor) -> None:
        self.A, self.left = A, left

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        added: Tensor = output + x @ self.A.mT.to(x) @ self.left.mT.to(x)
        return added


def _logits(base: BaseModel, batch: CalibrationBatch, positions: Tensor) -> Tensor:
    """Return the logits [N, V], float32 or float64, at `positions` in the flattened [S · L]."""
    head = base.model.get_output_embeddings()
    assert isinstance(head, nn.Module)

    def select(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        hidden: Tensor = inputs[0]  # [S, L, d]
        return (hidden.flatten(0, 1).index_select(0, positions)[None],)

    hook = head.register_forward_pre_hook(select)
    try:
        logits: Tensor = base.model(input_ids=batch.token_ids, use_cache=False).logits
    finally:
        hook.remove()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide[0]


def _check_losses(losses: Tensor, batch: CalibrationBatch) -> None:
    for row, loss in enumerate(losses.tolist()):
        if not math.isfinite(loss):
            raise InvalidInput(
                f"the loss of calibration example {batch.indices[row]} is {loss}", param="calibration"
            )
