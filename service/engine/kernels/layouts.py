"""The descriptions that the fused ops take: a group of target modules, norms, rotation and pages.

A group is one GEMM of the base model. Its weight holds the rows of one to three linear layers ("segments":
q, k, v; gate, up; or a single one), and below them the A of the target modules among them. Its output is

    y [T, N + C * r]        columns 0..N-1: the outputs of the segments, side by side
                            columns N + c*r .. N + (c+1)*r - 1: h_c = A_c x, r numbers per target module

with any row stride, so that rows may be padded for alignment. Knows no model, no batch and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Marks a segment in `GroupFactors.modules` that is no target module and gets no delta.
NO_MODULE = -1
#: Activations of `glu`.
ACTIVATIONS = ("silu", "gelu_tanh")
#: Most segments of a group (q, k, v): the kernels take a scalar for each.
MAX_SEGMENTS = 3


@dataclass(frozen=True)
class GroupFactors:
    """The part of one basis in one group, which does not change from step to step."""

    #: Number of outputs of every segment; N = sum(widths).
    widths: tuple[int, ...]
    #: [N, r], the B of the segments stacked in y's order; any floating dtype, contiguous.
    B: Tensor
    #: [S, M, r, r], each [r, r] contiguous; slot 0 holds zeros. float32, float16, bfloat16, or int8.
    R_slots: Tensor
    #: The index of each segment in M, or NO_MODULE.
    modules: tuple[int, ...]
    #: The number of the h block of each segment in y. Segments share a block where the model has one linear
    #: layer for both (Phi-3's qkv_proj: modules (m, m, m), columns (0, 0, 0)).
    columns: tuple[int, ...]
    #: [S, M] float32, only if R_slots is int8: value = int8 * scale.
    scales: Tensor | None = None
    #: [r, N], B transposed and contiguous, for groups of one segment (o, down), whose consumer reads whole
    #: rows; None for the others.
    B_T: Tensor | None = None

    def __post_init__(self) -> None:
        assert 1 <= len(self.widths) <= MAX_SEGMENTS
        assert len(self.modules) == len(self.columns) == len(self.widths)
        assert self.B.shape == (sum(self.widths), self.rank)
        assert self.B.is_contiguous()
        assert self.R_slots.ndim == 4
        assert self.R_slots.stride()[2:] == (self.rank, 1)
        assert (self.scales is not None) == (self.R_slots.dtype == torch.int8)
        assert all(m < self.R_slots.shape[1] for m in self.modules)

    @property
    def rank(self) -> int:
        return self.R_slots.shape[-1]

    @property
    def width(self) -> int:
        """N, the number of outputs of all segments."""
        return sum(self.widths)

    @property
    def h_width(self) -> int:
        """Number of columns of y after N, which hold h: r for each target module."""
        return self.rank * (1 + max(self.columns, default=-1))


def stack_factors(
    B: Sequence[Tensor | None],
    widths: Sequence[int],
    modules: Sequence[int],
    R_slots: Tensor,
    scales: Tensor | None = None,
) -> GroupFactors:
    """Return the `GroupFactors` of segments that are separate linear layers, with the h blocks in their
    order.

    B: for each segment [widths[i], r], or None where modules[i] is NO_MODULE. The number of a segment's h
    block is the number of target modules before it, so y has r columns per target module and none for other
    segments.
    """
    rank = R_slots.shape[-1]
    like = next(own for own in B if own is not None)
    segments = [
        like.new_zeros(width, rank) if own is None else own for own, width in zip(B, widths, strict=True)
    ]
    stacked = torch.cat(segments).contiguous()
    columns, count = [], 0
    for module in modules:
        columns.append(count if module != NO_MODULE else 0)
        count += module != NO_MODULE
    B_T = stacked.T.contiguous() if len(widths) == 1 else None
    return GroupFactors(tuple(widths), stacked, R_slots, tuple(modules), tuple(columns), scales, B_T)


@dataclass(frozen=True)
class GroupDelta:
    """The delta that a fused op adds."""

    factors: GroupFactors
    #: The slot of every token, int64 or int32 [T]; 0 for rows without an adapter of this basis.
    token_slots: Tensor


@dataclass(frozen=True)
class AddedDelta:
    """A delta for `add_deltas`, whose h is not in y."""

    factors: GroupFactors
    token_slots: Tensor
    #: [T, C * r], rows of any stride.
    h: Tensor


@dataclass(frozen=True)
class Norm:
    """RMS norm: x * rsqrt(mean(x²) + eps) * (weight, or 1 + weight)."""

    #: [N]
    weight: Tensor
    eps: float
    #: Whether 1 is added to the weight, as in Gemma.
    plus_one: bool = False


@dataclass(frozen=True)
class RowSquares:
    """A deferred norm, see `add_residual`: y must still be multiplied by rsqrt(Σ_p sums[t, p] / width +
    eps)."""

    #: float32 [T, P], partial sums of squares of the residual.
    sums: Tensor
    #: Number of columns of the residual.
    width: int
    eps: float


@dataclass(frozen=True)
class ResidualAdd:
    """How y is added to the residual: residual += multiplier * post(y + bias), where post may be no norm."""

    #: [N]
    bias: Tensor | None = None
    #: Granite's residual_multiplier.
    multiplier: float = 1.0
    #: The norm that Gemma-2, Gemma-3 and OLMo-2 apply to the output of a block.
    post: Norm | None = None


PLAIN_ADD = ResidualAdd()


@dataclass(frozen=True)
class QKVShape:
    """The shape of a layer for `qkv_rope`: y holds Hq query heads, Hkv key heads and Hkv value heads of D
    columns each."""

    #: Hq
    num_heads: int
    #: Hkv
    num_kv_heads: int
    #: D
    head_dim: int
    #: How many of a head's first columns are rotated, half-split as in transformers' Llama. Even; 0 for
    #: layers without positions.
    rotary_dim: int
    #: [N]
    bias: Tensor | None = None
    #: Applied to each query head before the rotation; its weight is [D].
    q_norm: Norm | None = None
    #: Applied to each key head before the rotation; its weight is [D].
    k_norm: Norm | None = None

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class StepRows:
    """The rows of a step for `qkv_rope`: the rotation of its T tokens and the places of their K and V."""

    #: [T, rotary_dim] or wider, rows of any stride, any floating dtype; None if nothing is rotated. As in
    #: transformers both halves of rotary_dim are the same, and only the first is read.
    cos: Tensor | None
    #: Like cos.
    sin: Tensor | None
    #: The pages of one layer, [num_blocks + 1, Hkv, block_size, D], contiguous.
    K: Tensor
    #: Like K.
    V: Tensor
    #: int64 or int32 [T]. Rows of block 0 (the null block, which is padding) write no K and V.
    blocks: Tensor
    #: int64 or int32 [T], the place of each token within its block.
    offsets: Tensor
