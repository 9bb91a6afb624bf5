"""The slow truth: each op of the adapter path in plain torch, for any device and dtype."""

from __future__ import annotations

from torch import Tensor


def rank_delta(h: Tensor, R_slots: Tensor, token_slots: Tensor) -> Tensor:
    """z[t] = R_slots[token_slots[t]] @ h[t]

    h: [T, r];  R_slots: [S, r, r];  token_slots: int64 [T] in 0..S-1, slot 0 holds zeros;  returns [T, r] in
    h.dtype.
    """
    return (R_slots[token_slots].to(h.dtype) @ h[:, :, None])[:, :, 0]


def adapter_delta(x: Tensor, A: Tensor, B: Tensor, R_slots: Tensor, token_slots: Tensor) -> Tensor:
    """y[t] = B @ R_slots[token_slots[t]] @ A @ x[t]

    x: [T, d_in];  A: [r, d_in];  B: [d_out, r];  R_slots: [S, r, r];  token_slots: int64 [T];  returns
    [T, d_out] in x.dtype.
    """
    return rank_delta(x @ A.T, R_slots, token_slots) @ B.T
