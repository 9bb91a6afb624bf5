"""Linear layers that read the same input, as one matrix product, with the adapters' shrink in it.

    y = x [W_1; ...; W_g; A_1; ...; A_c]ᵀ        [T, N + c r]: all outputs, then h = A x of each target module

The weights of the linear layers, and the factors that the generic path reads, become views of the fused
tensors. So nothing is held twice, and both paths always see the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from service.engine.adapters.linear import AdapterLinear, Factors
from service.engine.adapters.slots import SlotTable
from service.engine.kernels import NO_MODULE, AddedDelta, GroupDelta, GroupFactors, ops_for, stack_factors

#: The fused weight is padded with zero rows to a multiple of this, so that every row of y is aligned to 16
#: bytes, as tensor cores and vector loads require. From rank 8 on N + c r is such a multiple anyway.
_ROW_MULTIPLE = 8


class FusedProjection:
    """A fused product. names: the linear layers of `model` that are fused, in the order of their outputs.
    widths: of the segments that the reader of y distinguishes: one per layer, or more if the model itself has
    fused some (Phi-3)."""

    def __init__(self, model: nn.Module, names: Sequence[str], widths: Sequence[int]) -> None:
        self._model = model
        self._names = tuple(names)
        self._widths = tuple(widths)
        self._weight = torch.empty(0)
        self._own: tuple[GroupFactors, SlotTable] | None = None
        self._others: dict[str, tuple[GroupFactors, SlotTable, Tensor]] = {}
        self.width = sum(widths)
        linears = self._linears
        self._ops = ops_for(linears[0].weight.device)
        assert self.width == sum(linear.out_features for linear in linears)
        self.bias = _cat_biases(linears)

    def shape_with(self, basis_id: str) -> tuple[int, int]:
        """Return the numbers of rows and columns of the tensor that `fuse` takes."""
        A = [share.A for share in self._factors_of(basis_id) if share is not None]
        num_rows = self.width + sum(map(len, A))
        return -(-num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE, self._linears[0].in_features

    @torch.no_grad()
    def fuse(self, basis_id: str, fused: Tensor) -> None:
        """Make the weights views of `fused`, which has `shape_with` and is zero, with the A of `basis_id`
        below them; "" for no basis."""
        factors = self._factors_of(basis_id)
        A = [share.A for share in factors if share is not None]
        rank = A[0].shape[0] if A else 0
        weights = [linear.weight for linear in self._linears]
        num_rows = self.width + rank * len(A)
        torch.cat([*weights, *A], out=fused[:num_rows])
        outputs = torch.split(fused[: self.width], [len(weight) for weight in weights])
        for weight, rows in zip(weights, outputs, strict=True):
            weight.data = rows
        if A:
            views = iter(torch.split(fused[self.width : num_rows], rank))
            A_views = [next(views) if share is not None else None for share in factors]
            self._own = self._share(basis_id, factors, A_views)
        self._weight = fused

    def follow(self, basis_id: str) -> None:
        """Serve another basis beside the fused one."""
        factors = self._factors_of(basis_id)
        A = [share.A for share in factors if share is not None]
        if A:
            stacked = torch.cat(A)
            views = iter(torch.split(stacked, A[0].shape[0]))
            A_views = [next(views) if share is not None else None for share in factors]
            self._others[basis_id] = (*self._share(basis_id, factors, A_views), stacked)

    def forget(self, basis_id: str) -> None:
        """Stop serving a basis. The model's layers own its factors."""
        self._others.pop(basis_id, None)

    def restore(self) -> None:
        """Give every linear layer a weight of its own again, with the same bits."""
        for linear in self._linears:
            linear.weight.data = linear.weight.data.clone()
        self._weight = torch.empty(0)
        self._own, self._others = None, {}

    def __call__(self, x: Tensor) -> Tensor:
        """y [T, at least N + c r], including the deltas of every basis except the fused one. x: [T, d_in]."""
        y = torch.mm(x, self._weight.t())
        added = [
            AddedDelta(factors, slots.active, torch.mm(x, A.t()))
            for factors, slots, A in self._others.values()
            if slots.active is not None
        ]
        return self._ops.add_deltas(y, added) if added else y  # type: ignore[no-any-return]

    @property
    def delta(self) -> GroupDelta | None:
        """The delta that the reader of y must add for the fused basis; None if the step has no rows of it."""
        if self._own is None or self._own[1].active is None:
            return None
        return GroupDelta(self._own[0], self._own[1].active)

    @property
    def _linears(self) -> list[nn.Linear]:
        """The present layers. Attaching a basis replaces them by others with the same weights."""
        modules = [self._model.get_submodule(name) for name in self._names]
        return [module for module in modules if isinstance(module, nn.Linear)]

    def _factors_of(self, basis_id: str) -> list[Factors | None]:
        return [
            linear.factors.get(basis_id) if isinstance(linear, AdapterLinear) else None
            for linear in self._linears
        ]

    def _share(
        self, basis_id: str, factors: Sequence[Factors | None], A_views: Sequence[Tensor | None]
    ) -> tuple[GroupFactors, SlotTable]:
        """Return the factors of a basis in the layout of the ops. The factors in the layers become views of
        it."""
        table = next(share.slots for share in factors if share is not None)
        modules = [NO_MODULE if share is None else share.index for share in factors]
        linears = self._linears
        widths = [linear.out_features for linear in linears]
        B = [None if share is None else share.B for share in factors]
        group = stack_factors(B, widths, modules, table.R_slots)
        B_views = torch.split(group.B, widths)
        for linear, share, A, rows in zip(linears, factors, A_views, B_views, strict=True):
            if share is not None and A is not None:
                assert isinstance(linear, AdapterLinear)
                linear.factors[basis_id] = replace(share, A=A, B=rows)
        if len(self._widths) != len(self._linears):  # one linear layer for all segments: they share its h
            num = len(self._widths)
            group = replace(
                group, widths=self._widths, modules=(modules[0],) * num, columns=(0,) * num, B_T=None
            )
        return group, table


def _cat_biases(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
            for linear in linears
        ]
    )
