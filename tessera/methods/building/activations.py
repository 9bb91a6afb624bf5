"""The statistics of a module's inputs that calibration keeps, in memory that does not grow with the data.

Each rule receives the inputs of one module, batch by batch, or of several modules that read the same tensor
(query, key and value; gate and up). It knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

#: Up to this width, sums over batches are kept in float64, which costs at most 17 MB more per module.
MAX_DOUBLE_WIDTH = 2048


#: The product of a batch's inputs is added in this many parts, to bound the memory of the intermediate
#: result.
NUM_STRIPES = 8


def moment_bytes(width: int) -> int:
    """Return the bytes of one second moment [width, width]."""
    return width * width * (8 if width <= MAX_DOUBLE_WIDTH else 4)


class InputRule(Protocol):
    """A statistic of a module's inputs that is updated batch by batch."""

    def observe(self, x: Tensor, lengths: Sequence[int]) -> None:
        """Add a batch. x: [T, d_in], all rows' tokens without padding; lengths: number of tokens per row."""


class SecondMoment:
    """Z = mean x xᵀ and μ = mean x over all tokens (LoRA-DA's K-FAC factor; EVA's covariance is Z - μ μᵀ).

    Sums are taken about the mean of the first batch, because otherwise the covariance of inputs with a large
    mean would be the difference of two large numbers.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._sum: Tensor | None = None
        self.num_tokens = 0
        #: Number of modules that will call `take_moment`; 0: the sums are kept.
        self.num_readers = 0

    def observe(self, x: Tensor, lengths: Sequence[int]) -> None:
        """Add the rows of x [T, d_in] to the sums."""
        if not len(x):
            return
        if self._sum is None:
            dtype = torch.float64 if self._width <= MAX_DOUBLE_WIDTH else torch.float32
            self._shift = x.mean(0)
            self._sum = torch.zeros(self._width, dtype=dtype, device=x.device)
            self._outer = torch.zeros(self._width, self._width, dtype=dtype, device=x.device)
        centred = x - self._shift
        self._sum += centred.sum(0)
        for rows in range(0, self._width, step := -(-self._width // NUM_STRIPES)):
            self._outer[rows : rows + step] += centred[:, rows : rows + step].mT @ centred
        self.num_tokens += len(x)

    @property
    def mean(self) -> Tensor:
        """μ: [d_in]."""
        assert self._sum is not None
        return self._shift.to(self._sum) + self._sum / self.num_tokens

    @property
    def covariance(self) -> Tensor:
        """E[(x - μ)(x - μ)ᵀ]: [d_in, d_in], symmetric."""
        assert self._sum is not None
        offset = self._sum / self.num_tokens
        return self._outer / self.num_tokens - torch.outer(offset, offset)

    @property
    def moment(self) -> Tensor:
        """Z = E[x xᵀ], uncentred: [d_in, d_in], symmetric."""
        return self.covariance + torch.outer(self.mean, self.mean)

    def take_moment(self) -> Tensor:
        """Return Z in memory that the caller may overwrite.

        The last of `num_readers` callers gets the memory of the sums themselves; the rule is used up then.
        """
        self.num_readers -= 1
        if self.num_readers != 0:
            return self.moment
        assert self._sum is not None
        Z, mean, offset = self._outer, self.mean, self._sum / self.num_tokens
        del self._outer
        return Z.div_(self.num_tokens).addr_(offset, offset, alpha=-1).addr_(mean, mean)


class ScaledMoment:
    """CorDA's C: the mean over examples of x̃ᵀ x̃, where x̃ = x / |max x| within the example."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._outer: Tensor | None = None
        self.num_examples = 0

    def observe(self, x: Tensor, lengths: Sequence[int]) -> None:
        """Add the examples in x [T, d_in], which have these lengths, each scaled by itself."""
        if self._outer is None:
            dtype = torch.float64 if self._width <= MAX_DOUBLE_WIDTH else torch.float32
            self._outer = torch.zeros(self._width, self._width, dtype=dtype, device=x.device)
        for part in torch.split(x, list(lengths)):
            scaled = part / part.max().abs()
            self._outer += scaled.mT @ scaled
            self.num_examples += 1

    @property
    def moment(self) -> Tensor:
        """C: [d_in, d_in], symmetric."""
        assert self._outer is not None
        return self._outer / self.num_examples


class OutputMoment:
    """Y = (1 / N) Σ_t δ_t δ_tᵀ over all tokens, or only its diagonal; N is the number of tokens to learn.

    δ_t = ∂(-log p of the example) / ∂y_t. The sum runs over all positions and is divided by the tokens to
    *learn*, which makes Y ⊗ Z the Fisher information of one such token: an example's information is that of
    all its positions, and its tokens to learn share it (docs/methods.md, "LoRA-DA in detail").
    """

    def __init__(self, width: int, *, diagonal: bool) -> None:
        self._width, self._is_diagonal = width, diagonal
        self._sum: Tensor | None = None

    def observe(self, delta: Tensor) -> None:
        """Add the gradient at the module's output, delta [T, d_out], which is overwritten."""
        if self._sum is None:
            shape = (self._width,) if self._is_diagonal else (self._width, self._width)
            dtype = torch.float64 if self._width <= MAX_DOUBLE_WIDTH else torch.float32
            self._sum = torch.zeros(shape, dtype=dtype, device=delta.device)
        self._sum += delta.square_().sum(0) if self._is_diagonal else delta.mT @ delta

    def mean(self, num_tokens: int) -> Tensor:
        """Return Y: [d_out] (its diagonal) or [d_out, d_out]."""
        assert self._sum is not None
        return self._sum / num_tokens
