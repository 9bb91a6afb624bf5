"""Target modules that serve many adapters at once.

    y[t] = W x[t] (+ bias) + Σ over resident bases b of  B_b R_b[slot_b[t]] A_b x[t]

A module reads the slot of each token from the slot tables that it was given, so there is no global "current
batch". A basis without adapter rows in a step costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from service.engine.adapters.slots import SlotTable
from service.engine.kernels import adapter_delta
from tessera.errors import BasisMismatch, UnsupportedModel
from tessera.formats.basis import Basis
from tessera.formats.manifest import BasisManifest, ModuleShape
from tessera.model.base_model import replace_module


@dataclass(frozen=True)
class Factors:
    """The part of one basis in one module."""

    #: Name of the module.
    name: str
    #: [r, d_in]
    A: Tensor
    #: [d_out, r]
    B: Tensor
    #: [S, r, r], a view of `slots`.
    R_slots: Tensor
    slots: SlotTable
    #: Number of the module in the basis.
    index: int


class AdapterLinear(nn.Linear):
    """A linear layer with the weight of another, and the factors of every basis that targets it, by basis id.

    It is a subclass that shares the weight, rather than a wrapper around the module, so that names,
    `isinstance` and `.weight` remain what the model and a builder of bases expect.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self._original = (linear,)  # in a tuple, because nn.Module would register it as a child
        self.factors: dict[str, Factors] = {}

    @property
    def original(self) -> nn.Linear:
        """The layer that this one replaces."""
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_in], the T tokens of the batch in order, each with one row or several; returns [...,
        d_out]. Raises `UnsupportedModel` if x has other rows."""
        y = super().forward(x)
        for factors in self.factors.values():
            token_slots = factors.slots.active
            if token_slots is not None:
                num_rows = rows_per_token(x.shape[:-1], len(token_slots))
                if num_rows is None:
                    raise UnsupportedModel(
                        f"{factors.name} sees {list(x.shape)} and not the {len(token_slots)} tokens of the "
                        "step in order: leave it out of the target modules",
                        param="target_modules",
                    )
                if num_rows > 1:
                    token_slots = token_slots.repeat_interleave(num_rows)
                delta = adapter_delta(x.flatten(0, -2), factors.A, factors.B, factors.R_slots, token_slots)
                y += delta.view(y.shape)
        return y


def rows_per_token(leading: Sequence[int], num_tokens: int) -> int | None:
    """Return how many rows each token has in a tensor with these dimensions before the last, if it holds the
    rows of all tokens one after another: [1, T, d], [T, d], [1, T, heads, d]. None if it does not."""
    so_far = 1
    for index, size in enumerate(leading):
        so_far *= size
        if so_far == num_tokens:
            return math.prod(leading[index + 1 :])
    return None


def attach(model: nn.Module, basis: Basis, slots: SlotTable) -> None:
    """Make every target module of `basis` serve it. Raises `BasisMismatch` before anything is changed."""
    shares = []
    for index, module in enumerate(basis.manifest.modules):
        linear = _target(model, module)
        A, B = basis.A[index].to(linear.weight), basis.B[index].to(linear.weight)
        shares.append(Factors(module.name, A, B, slots.R_slots[:, index], slots, index))
    for module, factors in zip(basis.manifest.modules, shares, strict=True):
        layer = model.get_submodule(module.name)
        if not isinstance(layer, AdapterLinear):
            layer = replace_module(model, module.name, AdapterLinear)
        assert isinstance(layer, AdapterLinear)
        assert basis.basis_id not in layer.factors, "one model serves one engine"
        layer.factors[basis.basis_id] = factors


def detach(model: nn.Module, manifest: BasisManifest) -> None:
    """Undo `attach`. A module that serves no basis any more becomes the original linear layer again."""
    for module in manifest.modules:
        linear = model.get_submodule(module.name)
        assert isinstance(linear, AdapterLinear)
        del linear.factors[manifest.basis_id]
        if not linear.factors:
            replace_module(model, module.name, _original)


def _target(model: nn.Module, module: ModuleShape) -> nn.Linear:
    try:
        linear = model.get_submodule(module.name)
    except AttributeError:
        raise BasisMismatch(f"the base model has no module {module.name}") from None
    if not isinstance(linear, nn.Linear) or (linear.in_features, linear.out_features) != (
        module.d_in,
        module.d_out,
    ):
        raise BasisMismatch(
            f"module {module.name} is not a linear layer from {module.d_in} to {module.d_out}"
        )
    return linear


def _original(linear: nn.Linear) -> nn.Module:
    assert isinstance(linear, AdapterLinear)
    return linear.original
