"""What the fused ops are told: descriptions of a group of target modules, of norms, rotation and pages.

A group is one GEMM of the base model whose weight holds the rows of one to three linear layers ("segments":
q, k, v; gate, up; or a single one) and below them the A of the target modules among them. Its output is

    y [T, N + C * r]        columns 0..N-1: the segments' outputs side by side
                            columns N + c*r .. N + (c+1)*r - 1: h_c = A_c x, r numbers per target module

with any row stride, so that rows may be padded for alignment. Knows no model, no batch and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: In `GroupFactors.modules`: this segment is no target module and gets no delta.
NO_MODULE = -1
#: A group has at most this many segments (q, k, v): the kernels take them as scalars.
MAX_SEGMENTS = 3


@dataclass(frozen=True)
class GroupFactors:
    """One basis' share in one group: what does not change from step to step.

    widths: outputs of every segment, N = sum(widths). B: [N, r], the segments' B stacked in y's order, any
    floating dtype, contiguous. R_slots: [S, M, r, r], slot 0 holds zeros; each [r, r] contiguous; float32,
    float16, bfloat16, or int8 with scales [S, M] float32 (value = int8 * scale). modules: of every segment
    its index in M, or NO_MODULE. columns: of every segment, which of y's h blocks is its own; two segments
    share one where the model has one linear layer for both (Phi-3's qkv_proj: modules (m, m, m), columns (0,
    0, 0)). B_T: [r, N], B transposed and contiguous; wanted for groups of one segment (o, down), whose
    consumer reads whole rows; None elsewhere.
    """

    widths: tuple[int, ...]
    B: Tensor
    R_slots: Tensor
    modules: tuple[int, ...]
    columns: tuple[int, ...]
    scales: Tensor | None = None
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
        """N, the outputs of all segments."""
        return sum(self.widths)

    @property
    def h_width(self) -> int:
        """Columns of y after N that hold h: r for each target module."""
        return self.rank * (1 + max(self.columns, default=-1))


def stack_factors(
    B: Sequence[Tensor | None],
    widths: Sequence[int],
    modules: Sequence[int],
    R_slots: Tensor,
    scales: Tensor | None = None,
) -> GroupFactors:
    """`GroupFactors` of segments that are linear layers of their own; h blocks in their order.

    B: per segment [widths[i], r], or None where modules[i] is NO_MODULE. The h block of a segment is the
    number of target modules before it, so y has r columns per target module and none for the others.
    """
    rank = R_slots.shape[-1]
    like = next(part for part in B if part is not None)
    parts = [
        like.new_zeros(width, rank) if part is None else part for part, width in zip(B, widths, strict=True)
    ]
    stacked = torch.cat(parts).contiguous()
    columns, count = [], 0
    for module in modules:
        columns.append(count if module != NO_MODULE else 0)
        count += module != NO_MODULE
    B_T = stacked.T.contiguous() if len(widths) == 1 else None
    return GroupFactors(tuple(widths), stacked, R_slots, tuple(modules), tuple(columns), scales, B_T)


@dataclass(frozen=True)
class GroupDelta:
    """The delta that a fused op adds: a basis' factors and which slot every token uses.

    token_slots: int64 or int32 [T], 0 for rows without an adapter of this basis.
    """

    factors: GroupFactors
    token_slots: Tensor


@dataclass(frozen=True)
class AddedDelta:
    """A delta for `add_deltas`, whose h does not stand in y. h: [T, C * r], rows of any stride."""

    factors: GroupFactors
    token_slots: Tensor
    h: Tensor


@dataclass(frozen=True)
class Norm:
    """RMS norm: x * rsqrt(mean(x²) + eps) * (weight, or 1 + weight as Gemma has it). weight: [N]."""

    weight: Tensor
    eps: float
    plus_one: bool = False


@dataclass(frozen=True)
class RowSquares:
    """A norm that was put off: y must still be multiplied by rsqrt(Σ_p sums[t, p] / width + eps).

    sums: float32 [T, P], partial sums of squares of the residual. See `add_residual`.
    """

    sums: Tensor
    width: int
    eps: float


@dataclass(frozen=True)
class ResidualAdd:
    """How y joins the residual: residual += multiplier * post(y + bias), where post is a norm or nothing.

    bias: [N]. multiplier: Granite's residual_multiplier. post: the norm that Gemma-2, Gemma-3 and OLMo-2 put
    behind a block.
    """

    bias: Tensor | None = None
    multiplier: float = 1.0
    post: Norm | None = None


PLAIN_ADD = ResidualAdd()


@dataclass(frozen=True)
class QKVShape:
    """The layer's side of `qkv_rope`: y holds Hq query heads, Hkv key heads and Hkv value heads of D columns.

    rotary_dim: how many of a head's first columns are rotated, half-split as in transformers' Llama; even; 0
    for layers without positions. bias: [N] or None. q_norm, k_norm: of [D], per head, before the rotation.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    bias: Tensor | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class StepRows:
    """The step's side of `qkv_rope`: where its T tokens stand and where their KV belongs.

    cos, sin: [T, rotary_dim] or wider, rows of any stride, any floating dtype; as in transformers both halves
    of rotary_dim hold the same, and only the first is read; None if nothing is rotated. K, V: pages of one
    layer, [num_blocks + 1, Hkv, block_size, D], contiguous. blocks, offsets: int64 or int32 [T]; rows of
    block 0 (the null block: padding) write no K and V.
    """

    cos: Tensor | None
    sin: Tensor | None
    K: Tensor
    V: Tensor
    blocks: Tensor
    offsets: Tensor
