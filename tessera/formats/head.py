"""The classification head of an adapter: from one hidden state to a score per label.

    scores[c] = W[c] · h + b[c]            h [d]: the pooled hidden state of the base model (`pooling.py`)

A head belongs to one task of one user, so it is stored with the adapter, always in float32, and its labels
are in the adapter's metadata. Weight and bias are one tensor `[C, d + 1]` with the bias in the last column.
A regression has one score and no labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.defaults import MAX_LABEL_CHARS, MAX_LABELS
from tessera.errors import InvalidInput

CLASSIFICATION, REGRESSION = PROBLEM_TYPES = ("single_label_classification", "regression")
#: The widest hidden state; that of the largest models known is 16,384.
MAX_HEAD_WIDTH = 65_536
#: The key of the adapter's metadata under which `describe` is stored.
METADATA_KEY = "classification"


@dataclass(frozen=True)
class ClassificationHead:
    """The head of one task.

    Raises `InvalidInput` if weight has another shape or dtype than the labels ask for, or holds a value that
    is not finite.
    """

    #: [C, d + 1] float32, contiguous, on the CPU; the last column is the bias. C is 1 for a regression.
    weight: Tensor
    #: The names of the classes, by index; empty for a regression.
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape, expected = tuple(self.weight.shape), len(self.labels) or 1
        if len(shape) != 2 or shape[0] != expected or not 2 <= shape[1] <= MAX_HEAD_WIDTH + 1:
            message = f"the head must be of shape [{expected}, d + 1]; got {list(shape)}"
            raise InvalidInput(message, param="head")
        if self.weight.dtype != torch.float32 or not bool(torch.isfinite(self.weight).all()):
            raise InvalidInput("the head must hold finite float32 numbers", param="head")
        check_labels(self.labels)

    @property
    def width(self) -> int:
        """Return d, the width of the hidden state."""
        return self.weight.shape[1] - 1

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores [n, C] of pooled hidden states [n, d], in float32."""
        return torch.addmm(self.weight[:, -1], hidden.float(), self.weight[:, :-1].T)

    def describe(self) -> dict[str, Any]:
        """Return what the adapter's metadata say about the head."""
        problem_type = REGRESSION if self.is_regression else CLASSIFICATION
        return {"problem_type": problem_type, "labels": list(self.labels)}


def check_labels(labels: Sequence[str]) -> None:
    """Raise `InvalidInput` unless there are none, or 2 to MAX_LABELS different names."""
    if not labels:
        return
    if not 2 <= len(labels) <= MAX_LABELS or len(set(labels)) != len(labels):
        message = f"a head has 2 to {MAX_LABELS} different labels; got {len(labels)}"
        raise InvalidInput(message, param="head.labels")
    for label in labels:
        if not isinstance(label, str) or not 0 < len(label) <= MAX_LABEL_CHARS:
            message = f"a label has 1 to {MAX_LABEL_CHARS} characters"
            raise InvalidInput(message, param="head.labels")


def described_labels(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the labels that `describe` has put into the metadata. Raises `InvalidInput`."""
    described = metadata.get(METADATA_KEY)
    if not isinstance(described, dict) or described.get("problem_type") not in PROBLEM_TYPES:
        raise InvalidInput("the metadata do not describe the head", param="metadata")
    labels = described.get("labels")
    if not isinstance(labels, list) or bool(labels) == (described["problem_type"] == REGRESSION):
        raise InvalidInput("the metadata do not list the labels of the head", param="metadata")
    check_labels(labels)
    return tuple(labels)
