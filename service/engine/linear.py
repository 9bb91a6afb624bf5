"""Target modules that serve many adapters at once.

    y[t] = W x[t] (+ bias) + Σ over resident bases b of  B_b R_b[slot_b[t]] A_b x[t]

What a module needs of a step (which token has which slot) it reads from the slot tables that it was given, so
there is no global "current batch". A basis for which a step has no adapter rows costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adapter_core.base_model import replace_module
from adapter_core.basis import Basis, BasisManifest, ModuleShape
from adapter_core.errors import BasisMismatch
from adapter_core.kernels import adapter_delta
from service.engine.slots import SlotTable


@dataclass(frozen=True)
class Factors:
    """One basis' share in one module. A: [r, d_in], B: [d_out, r], R_slots: [S, r, r], seen in `slots`, where
    the module has number `index`."""

    A: Tensor
    B: Tensor
    R_slots: Tensor
    slots: SlotTable
    index: int


class AdapterLinear(nn.Linear):
    """A linear layer with the weight of another, and the factors of every basis that targets it, by basis id.

    A subclass that shares the weight, and not a wrapper round the module, so that names, `isinstance` and
    `.weight` stay what the model and a builder of bases expect.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self._original = (linear,)  # in a tuple, or nn.Module would register it as a child
        self.factors: dict[str, Factors] = {}

    @property
    def original(self) -> nn.Linear:
        """The layer in whose place this one stands."""
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_in], the tokens of the flattened batch in order; returns [..., d_out]."""
        y = super().forward(x)
        for factors in self.factors.values():
            token_slots = factors.slots.active
            if token_slots is not None:
                assert x.numel() == len(token_slots) * self.in_features, (
                    "a target module must see the whole batch in order"
                )
                rows = x.reshape(-1, self.in_features)
                y += adapter_delta(rows, factors.A, factors.B, factors.R_slots, token_slots).view(y.shape)
        return y


def attach(model: nn.Module, basis: Basis, slots: SlotTable) -> None:
    """Let every target module of `basis` serve it. Raises `BasisMismatch` before anything is changed."""
    shares = []
    for index, module in enumerate(basis.manifest.modules):
        linear = _target(model, module)
        A, B = basis.A[index].to(linear.weight), basis.B[index].to(linear.weight)
        shares.append(Factors(A, B, slots.R_slots[:, index], slots, index))
    for module, factors in zip(basis.manifest.modules, shares, strict=True):
        layer = model.get_submodule(module.name)
        if not isinstance(layer, AdapterLinear):
            layer = replace_module(model, module.name, AdapterLinear)
        assert isinstance(layer, AdapterLinear)
        assert basis.basis_id not in layer.factors, "one model serves one engine"
        layer.factors[basis.basis_id] = factors


def detach(model: nn.Module, manifest: BasisManifest) -> None:
    """Undo `attach`; a module that serves no basis any more becomes the linear layer that it was."""
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
        raise BasisMismatch(f"module {module.name} is no linear layer from {module.d_in} to {module.d_out}")
    return linear


def _original(linear: nn.Linear) -> nn.Module:
    assert isinstance(linear, AdapterLinear)
    return linear.original
