"""The fused path: one step of a whole model through fused ops.

    residual = embedding(ids)
    per layer    y = qkv(x)        q, K, V = rope(y)          o = attention(q)
                 y = o(o)          residual += y              x = norm(residual)
                 y = gate_up(x)    a = act(gate) · up
                 y = down(a)       residual += y              x = norm(residual)
    logits = head(x)

Every op reads the output of a product once and adds the delta of the adapters to it. If there is a norm
between the residual and a product, its division is deferred to the op behind that product (`add_residual`),
so that no program needs a whole row. Knows no request and no plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from service.engine.attention.reference import AttentionStep, TokenRows
from service.engine.forward.projection import FusedProjection
from service.engine.forward.spec import LayerSpec, ModelSpec, NotFusable, rotary_tables
from service.engine.kernels import AddedDelta, Norm, QKVShape, ResidualAdd, RowSquares, StepRows, ops_for
from service.engine.kv.cache import KVShape, PagedKV

#: The dtypes in which a norm's division may be deferred. What the product reads is then the residual times
#: the weight of the norm, and the residuals of common models exceed the range of float16, which ends at
#: 65,504.
_DEFERRING_DTYPES = (torch.bfloat16, torch.float32)

#: The size of a device's memory pages; on a CPU the alignment of vector loads.
_PAGE_BYTES = {"cuda": 2 * 1024**2, "cpu": 64}

#: The input of a block: x, and the deferred norm that its first op must apply.
_Input = tuple[Tensor, RowSquares | None]


@dataclass(frozen=True)
class FusedLayer:
    """The products of one decoder layer, and the arguments of its ops."""

    spec: LayerSpec
    qkv: FusedProjection
    o: FusedProjection
    gate_up: FusedProjection
    down: FusedProjection
    shape: QKVShape
    add_attention: ResidualAdd
    add_mlp: ResidualAdd

    @property
    def projections(self) -> tuple[FusedProjection, ...]:
        return (self.qkv, self.o, self.gate_up, self.down)


class FusedModel:
    """Runs `model`, which `spec` describes, with the adapters of `basis_id` in its products, until `close`.

    shapes: what every layer stores. num_positions: the longest request in tokens. Raises `NotFusable` before
    anything is changed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ModelSpec,
        shapes: Sequence[KVShape],
        *,
        basis_id: str,
        num_positions: int,
    ) -> None:
        self._spec = spec
        self._ops = ops_for(model.device)
        self._embed = model.get_submodule("model.embed_tokens")
        self._head = _linear(model, "lm_head")
        self.vocab_size = self._head.out_features
        self._rotaries = rotary_tables(model, spec.rotaries, num_positions)
        self._followed: set[str] = set()
        self.basis_id = basis_id
        self._layers = [
            self._build_layer(model, layer, shape) for layer, shape in zip(spec.layers, shapes, strict=True)
        ]
        for layer in self._layers:
            sizes = [projection.shape_with(basis_id) for projection in layer.projections]
            weights = allocate_together(sizes, like=self._embed.weight)
            for projection, weight in zip(layer.projections, weights, strict=True):
                projection.fuse(basis_id, weight)
            if model.device.type == "cuda":
                # frees the layers' own weights: otherwise the device would hold the model twice
                torch.cuda.empty_cache()

    def follow(self, basis_ids: Iterable[str]) -> None:
        """Serve exactly these bases beside the fused one, which may be among them or not."""
        others = set(basis_ids) - {self.basis_id}
        for layer in self._layers if others != self._followed else ():
            for projection in layer.projections:
                for basis_id in self._followed - others:
                    projection.forget(basis_id)
                for basis_id in others - self._followed:
                    projection.follow(basis_id)
        self._followed = others

    def close(self) -> None:
        """Give the model's layers their own weights back."""
        for layer in self._layers:
            for projection in layer.projections:
                projection.restore()

    def forward(
        self,
        rows: TokenRows,
        kv: PagedKV,
        step: AttentionStep,
        logit_rows: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [n, V] of some rows, int64 [n], or of all rows; written to `out` if it is
        given."""
        x = self._states(rows, kv, step)
        return self._logits(x if logit_rows is None else x.index_select(0, logit_rows), out)

    def forward_hidden(
        self, rows: TokenRows, kv: PagedKV, step: AttentionStep, logit_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [n, V] of some rows, int64 [n], and their hidden states [n, d] after the final
        norm."""
        hidden = self._states(rows, kv, step).index_select(0, logit_rows)
        return self._logits(hidden, None), hidden

    def _states(self, rows: TokenRows, kv: PagedKV, step: AttentionStep) -> Tensor:
        """Return the hidden states [T, d] of all rows after the final norm."""
        spec = self._spec
        angles = {
            name: (cos.index_select(0, rows.positions), sin.index_select(0, rows.positions))
            for name, (cos, sin) in self._rotaries.items()
        }
        residual: Tensor = self._embed(rows.input_ids)
        if spec.embedding_scale != 1:
            residual = residual * spec.embedding_scale
        x = residual if spec.first_norm is None else self._ops.rms_norm(residual, spec.first_norm)
        squares: RowSquares | None = None
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            cos, sin = (None, None) if layer.spec.rotary is None else angles[layer.spec.rotary]
            places = StepRows(cos, sin, *kv.pages_of(index), rows.blocks, rows.offsets)
            q = self._query(layer, layer.qkv(x), places, squares)
            attended = step.attend_cached(index, q, layer.spec.attention).flatten(1)
            x, squares = self._add(residual, layer.o, attended, layer.spec.pre_mlp_norm, layer.add_attention)
            group = layer.gate_up
            gated = self._ops.glu(
                group(x), group.width // 2, spec.activation, group.delta, bias=group.bias, squares=squares
            )
            x, squares = self._add(
                residual, layer.down, gated, layer.spec.next_norm, layer.add_mlp, is_last=index == last
            )
        return x

    def _add(
        self,
        residual: Tensor,
        projection: FusedProjection,
        x: Tensor,
        norm: Norm | None,
        how: ResidualAdd,
        *,
        is_last: bool = False,
    ) -> _Input:
        """Add the projection of x to the residual. Returns the input of the next block. The division for the
        head is not deferred, because no op of ours reads the logits."""
        y = projection(x)
        can_defer = how.post is None and residual.dtype in _DEFERRING_DTYPES and not is_last
        if norm is not None and can_defer:
            deferred: _Input = self._ops.add_residual(y, residual, norm, projection.delta, how)
            return deferred
        return self._ops.add_rms_norm(y, residual, norm, projection.delta, how), None

    def _query(self, layer: FusedLayer, y: Tensor, places: StepRows, squares: RowSquares | None) -> Tensor:
        """Return the rotated q [T, Hq, D] of the layer. K and V are written to their pages."""
        delta, spec = layer.qkv.delta, layer.spec
        if self._spec.has_wide_qk_norms:  # norms over all heads need the whole output first
            assert squares is None
            if delta is not None:
                h = y[:, layer.shape.width :]
                self._ops.add_deltas(y, [AddedDelta(delta.factors, delta.token_slots, h)])
            q_width = layer.shape.num_heads * layer.shape.head_dim
            kv_width = layer.shape.num_kv_heads * layer.shape.head_dim
            for norm, first, width in ((spec.q_norm, 0, q_width), (spec.k_norm, q_width, kv_width)):
                assert norm is not None
                heads = y[:, first : first + width]
                self._ops.rms_norm(heads, norm, out=heads)
            delta = None
        q: Tensor = self._ops.qkv_rope(y, layer.shape, places, delta, squares)
        return q

    def _logits(self, x: Tensor, out: Tensor | None) -> Tensor:
        logits = torch.mm(x, self._head.weight.t(), out=out)
        if self._spec.logit_divisor is not None:
            logits.div_(self._spec.logit_divisor)
        if self._spec.logit_softcap is not None:
            logits.div_(self._spec.logit_softcap).tanh_().mul_(self._spec.logit_softcap)
        return logits

    def _build_layer(self, model: nn.Module, spec: LayerSpec, kv: KVShape) -> FusedLayer:
        head_dim, scale = self._spec.head_dim, self._spec.residual_scale
        attention_out, mlp_out = _linear(model, spec.o), _linear(model, spec.down)
        hidden, ff = attention_out.out_features, mlp_out.in_features
        num_heads = attention_out.in_features // head_dim
        if (kv.key_dim, kv.value_dim) != (head_dim, head_dim):
            raise NotFusable(f"its heads have {kv.key_dim} and {kv.value_dim} columns, not {head_dim}")
        qkv_widths = (num_heads * head_dim, kv.num_kv_heads * head_dim, kv.num_kv_heads * head_dim)
        qkv = FusedProjection(model, spec.qkv, qkv_widths)
        o = FusedProjection(model, [spec.o], [hidden])
        down = FusedProjection(model, [spec.down], [hidden])
        if self._spec.has_wide_qk_norms and qkv.bias is not None:
            raise NotFusable("it has biases before a norm over all heads")
        is_wide = self._spec.has_wide_qk_norms
        return FusedLayer(
            spec=spec,
            qkv=qkv,
            o=o,
            gate_up=FusedProjection(model, spec.gate_up, (ff, ff)),
            down=down,
            shape=QKVShape(
                num_heads,
                kv.num_kv_heads,
                head_dim,
                rotary_dim=0 if spec.rotary is None else self._rotaries[spec.rotary][0].shape[1],
                bias=qkv.bias,
                q_norm=None if is_wide else spec.q_norm,
                k_norm=None if is_wide else spec.k_norm,
            ),
            add_attention=ResidualAdd(o.bias, scale, spec.post_attention_norm),
            add_mlp=ResidualAdd(down.bias, scale, spec.post_mlp_norm),
        )


def allocate_together(shapes: Sequence[tuple[int, int]], *, like: Tensor) -> list[Tensor]:
    """Zeros of these shapes side by side in one allocation, each starting at a page.

    Their place matters: 8B in bfloat16 on an H200 at rank 16 and batch 1, a step takes 4.84 ms with each
    weight in an allocation of its own, with sizes that are no multiples of large pages, and 4.71 ms with this
    (batch 32: 6.33 and 6.25).
    """
    page = _PAGE_BYTES[like.device.type] // like.itemsize
    sizes = [-(-rows * columns // page) * page for rows, columns in shapes]
    memory = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
    pieces = torch.split(memory, sizes)
    return [
        piece[: rows * columns].view(rows, columns)
        for piece, (rows, columns) in zip(pieces, shapes, strict=True)
    ]


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
