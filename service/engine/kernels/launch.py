"""The fused ops on a CUDA device: check the arguments, choose tiles by the shapes, launch the kernels.

The functions have the same names as in `reference.py`, which documents them. Importing this module imports
Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.kernels import add_norm, deltas, glu_kernel, qkv_rope_kernel, tiling
from service.engine.kernels.arguments import (
    DeltaArguments,
    apply_core,
    delta_arguments,
    gathered,
    launch_options,
    no_delta,
    num_sums,
    padded,
    squares_arguments,
)
from service.engine.kernels.layouts import (
    ACTIVATIONS,
    PLAIN_ADD,
    AddedDelta,
    GroupDelta,
    Norm,
    QKVShape,
    ResidualAdd,
    RowSquares,
    StepRows,
)


def qkv_rope(
    y: Tensor,
    shape: QKVShape,
    rows: StepRows,
    delta: GroupDelta | None = None,
    squares: RowSquares | None = None,
) -> Tensor:
    assert y.stride(1) == 1
    assert rows.K.is_contiguous()
    assert rows.V.is_contiguous()
    heads, kv_heads, D = shape.num_heads, shape.num_kv_heads, shape.head_dim
    assert rows.K.shape[1] == rows.V.shape[1] == kv_heads
    assert rows.K.shape[3] == rows.V.shape[3] == D
    norms = [norm for norm in (shape.q_norm, shape.k_norm) if norm is not None]
    assert len({(norm.eps, norm.plus_one) for norm in norms}) <= 1, "the norms of q and k must be of one kind"
    assert all(_is_dense(part) for part in (rows.blocks, rows.offsets))
    assert all(part is None or part.stride(1) == 1 for part in (rows.cos, rows.sin))
    T, half = len(y), shape.rotary_dim // 2
    q = torch.empty(T, heads, D, dtype=y.dtype, device=y.device)
    if T == 0:
        return q
    tile = _tile("qkv_rope", y, delta)
    arguments = delta_arguments(delta, y, tile)
    cos, sin = (y if part is None else part for part in (rows.cos, rows.sin))
    q_norm, k_norm = (y if norm is None else norm.weight for norm in (shape.q_norm, shape.k_norm))
    qkv_rope_kernel.qkv_rope_kernel[(_tiles(T, tile.tokens), heads + 2 * kv_heads)](
        *(
            y,
            y.stride(0),
            q,
            cos,
            cos.stride(0),
            sin,
            sin.stride(0),
            rows.K,
            rows.V,
            rows.blocks,
            rows.offsets,
        ),
        *(_or(shape.bias, y), q_norm, k_norm, norms[0].eps if norms else 0.0),
        *(squares_arguments(squares, y), arguments.values, T),
        HQ=heads,
        HKV=kv_heads,
        D=D,
        BLOCK_SIZE=rows.K.shape[2],
        HALF=half,
        HALF_TILE=padded(half),
        REST_TILE=padded(D - 2 * half),
        BIAS=shape.bias is not None,
        Q_NORM=shape.q_norm is not None,
        K_NORM=shape.k_norm is not None,
        PLUS_ONE=bool(norms) and norms[0].plus_one,
        SUMS=num_sums(squares),
        SPEC=arguments.spec,
        DOT=tile.tokens >= 16,
        BT=tile.tokens,
        **launch_options(arguments, tile.warps),
    )
    return q


def glu(
    y: Tensor,
    width: int,
    act: str,
    delta: GroupDelta | None = None,
    *,
    bias: Tensor | None = None,
    squares: RowSquares | None = None,
) -> Tensor:
    assert act in ACTIVATIONS, act
    assert y.stride(1) == 1
    T = len(y)
    out = torch.empty(T, width, dtype=y.dtype, device=y.device)
    if T == 0:
        return out
    tile = _tile("glu", y, delta)
    arguments = delta_arguments(delta, y, tile)
    glu_kernel.glu_kernel[(_tiles(T, tile.tokens), _tiles(width, tile.columns))](
        *(y, y.stride(0), out, _or(bias, y), squares_arguments(squares, y), arguments.values, T),
        WIDTH=width,
        GELU=act == "gelu_tanh",
        BIAS=bias is not None,
        SUMS=num_sums(squares),
        SPEC=arguments.spec,
        DOT=tile.tokens >= 16,
        BT=tile.tokens,
        BN=tile.columns,
        **launch_options(arguments, tile.warps),
    )
    return out


def add_rms_norm(
    y: Tensor,
    residual: Tensor,
    norm: Norm | None,
    delta: GroupDelta | None = None,
    how: ResidualAdd = PLAIN_ADD,
) -> Tensor:
    """With a delta this takes one launch for small ranks and few tokens. Otherwise the delta is added first,
    in tiles that share B."""
    T = len(y)
    out = torch.empty_like(residual) if norm is not None else residual
    if T == 0:
        return out
    if delta is not None and not _fits_rows(delta, T):
        if how.post is None:
            _add(y, residual, norm, delta, how, is_scaled=False)
            return rms_norm(residual, norm, out) if norm is not None else residual
        _add(y, None, None, delta, PLAIN_ADD, is_scaled=False)
        delta = None
    _rows(y, residual, out, norm, delta, how)
    return out


def add_residual(
    y: Tensor,
    residual: Tensor,
    norm: Norm,
    delta: GroupDelta | None = None,
    how: ResidualAdd = PLAIN_ADD,
) -> tuple[Tensor, RowSquares]:
    assert how.post is None, "a norm behind the block needs whole rows first"
    x, sums = _add(y, residual, norm, delta, how, is_scaled=True)
    return x, RowSquares(sums, residual.shape[1], norm.eps)


def rms_norm(x: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if len(x):
        _rows(x, None, out, norm, None, PLAIN_ADD)
    return out


def add_deltas(y: Tensor, added: Sequence[AddedDelta]) -> Tensor:
    T = len(y)
    if T == 0 or not added:
        return y
    widths = added[0].factors.widths
    assert all(delta.factors.widths == widths for delta in added)
    assert all(len(delta.token_slots) == len(delta.h) == T and delta.h.stride(1) == 1 for delta in added)
    tile = max((_tile("add", y, delta) for delta in added), key=lambda tile: -tile.columns)
    arguments = [
        apply_core(gathered(delta.factors, delta.token_slots, delta.h), delta.factors, T, tile)
        for delta in added
    ]
    num_tiles = sum(_tiles(width, tile.columns) for width in widths)
    deltas.add_deltas_kernel[(_tiles(T, tile.tokens), num_tiles)](
        *(y, y.stride(0), tuple(each.values for each in arguments), T),
        WIDTHS=(*widths, 0, 0)[:3],
        SPECS=tuple(each.spec for each in arguments),
        DOT=tile.tokens >= 16,
        BT=tile.tokens,
        BN=tile.columns,
        **launch_options(arguments[0], tile.warps),
    )
    return y


def _fits_rows(delta: GroupDelta, num_tokens: int) -> bool:
    fits = delta.factors.rank <= tiling.MAX_ROW_RANK and num_tokens <= tiling.MAX_ROW_TOKENS
    return fits and delta.factors.B_T is not None


def _add(
    y: Tensor,
    residual: Tensor | None,
    norm: Norm | None,
    delta: GroupDelta | None,
    how: ResidualAdd,
    *,
    is_scaled: bool,
) -> tuple[Tensor, Tensor]:
    """Add to the residual, or to y itself if there is none, tile by tile. Return x and sums, which are filled
    in only if is_scaled."""
    assert y.stride(1) == 1
    T = len(y)
    if residual is None:
        assert delta is not None
        into, N = y, delta.factors.width
    else:
        assert residual.is_contiguous()
        into, N = residual, residual.shape[1]
    tile = _tile("add", y, delta)
    num_tiles = _tiles(N, tile.columns)
    x = torch.empty_like(into) if is_scaled else into
    sums = torch.empty(T, num_tiles, dtype=torch.float32, device=y.device) if is_scaled else into
    if T:
        arguments = delta_arguments(delta, y, tile)
        add_norm.add_kernel[(_tiles(T, tile.tokens), num_tiles)](
            *(y, y.stride(0), into, x, sums, y if norm is None else norm.weight, _or(how.bias, y)),
            *(float(how.multiplier), arguments.values, T),
            N=N,
            BIAS=how.bias is not None,
            RESIDUAL=residual is not None,
            SCALED=is_scaled,
            PLUS_ONE=norm is not None and norm.plus_one,
            SPEC=arguments.spec,
            DOT=tile.tokens >= 16,
            BT=tile.tokens,
            BN=tile.columns,
            **launch_options(arguments, tile.warps),
        )
    return x, sums


def _rows(
    y: Tensor,
    residual: Tensor | None,
    out: Tensor,
    norm: Norm | None,
    delta: GroupDelta | None,
    how: ResidualAdd,
) -> None:
    """The row form: one program per row."""
    assert y.stride(1) == 1
    assert out.stride(1) == 1
    N = out.shape[1]
    arguments, B_T = _row_delta(delta, y)
    post = how.post
    add_norm.row_kernel[(len(y),)](
        *(y, y.stride(0), y if residual is None else residual, out, out.stride(0)),
        *(y if norm is None else norm.weight, 0.0 if norm is None else norm.eps),
        *(y if post is None else post.weight, 0.0 if post is None else post.eps),
        *(_or(how.bias, y), float(how.multiplier), arguments.values, B_T),
        N=N,
        BN=padded(N),
        RESIDUAL=residual is not None,
        NORM=norm is not None,
        PLUS_ONE=norm is not None and norm.plus_one,
        POST=post is not None,
        POST_PLUS_ONE=post is not None and post.plus_one,
        BIAS=how.bias is not None,
        SPEC=arguments.spec,
        **launch_options(arguments, tiling.row_warps(N, has_delta=delta is not None)),
    )


def _row_delta(delta: GroupDelta | None, y: Tensor) -> tuple[DeltaArguments, Tensor]:
    if delta is None:
        return no_delta(y), y
    factors = delta.factors
    assert factors.B_T is not None
    assert len(delta.token_slots) == len(y)
    return gathered(factors, delta.token_slots, y[:, factors.width :]), factors.B_T


def _tile(op: str, y: Tensor, delta: GroupDelta | AddedDelta | None) -> tiling.Tile:
    rank = 0 if delta is None else delta.factors.rank
    return tiling.tile_of(op, len(y), rank=rank, itemsize=y.itemsize)


def _or(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like if tensor is None else tensor


def _is_dense(vector: Tensor) -> bool:
    return len(vector) < 2 or vector.stride(0) == 1


def _tiles(count: int, size: int) -> int:
    return -(-count // size)
