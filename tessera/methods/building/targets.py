"""The layers that a basis is built for, checked before any work is done, and cut into groups of layers.

Knows nothing of methods or data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera.errors import InvalidInput, UnsupportedModel
from tessera.formats.manifest import ModuleShape
from tessera.model.base_model import iter_target_modules
from tessera.model.target_names import check_rank

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """One target module. weight: [d_out, d_in], the base model's own, never written to."""

    shape: ModuleShape
    linear: nn.Linear

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def weight(self) -> Tensor:
        return self.linear.weight.detach()

    @property
    def layer(self) -> str:
        """The dotted name up to its first number, which is what a decoder layer is called."""
        parts = self.name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
        return ".".join(parts[: numbers[0] + 1]) if numbers else self.name


def find_targets(model: nn.Module, patterns: Sequence[str], rank: int) -> list[Target]:
    """All target modules, in model order, fit for a basis of this rank.

    Raises `UnsupportedModel` (nothing matches; a quantised or a tied weight) and `InvalidInput` (the rank,
    or a weight that is not finite), naming the module and the value.
    """
    owners = _owners_of_weights(model)
    targets = []
    for name, linear in iter_target_modules(model, patterns):
        _check_weight(name, linear, owners)
        targets.append(Target(ModuleShape(name, linear.in_features, linear.out_features), linear))
    for target in targets:
        check_rank(rank, target.shape)
    return targets


def layer_groups(
    targets: Sequence[Target], bytes_per_target: Sequence[int], limit_bytes: int
) -> Iterator[range]:
    """Runs of whole layers as ranges of indices, each of at most `limit_bytes` or of one layer."""
    start = size = layer_start = 0
    for index in range(1, len(targets) + 1):
        if index < len(targets) and targets[index].layer == targets[layer_start].layer:
            continue
        layer_size = sum(bytes_per_target[layer_start:index])
        if layer_start > start and size + layer_size > limit_bytes:
            yield range(start, layer_start)
            start, size = layer_start, 0
        size += layer_size
        layer_start = index
    if targets:
        yield range(start, len(targets))


def module_groups(
    targets: Sequence[Target], bytes_per_target: Sequence[int], limit_bytes: int
) -> Iterator[range]:
    """As `layer_groups`, but a layer of more than `limit_bytes` is cut, down to single modules."""
    for group in layer_groups(targets, bytes_per_target, limit_bytes):
        start, size = group.start, 0
        for index in group:
            if index > start and size + bytes_per_target[index] > limit_bytes:
                yield range(start, index)
                start, size = index, 0
            size += bytes_per_target[index]
        yield range(start, group.stop)


def _owners_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """The names of the parameters at each address: more than one name means that they are tied."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    return owners


def _check_weight(name: str, linear: nn.Linear, owners: dict[int, list[str]]) -> None:
    weight = linear.weight
    if weight.dtype not in _WEIGHT_DTYPES:
        raise UnsupportedModel(
            f"target module {name} has {weight.dtype} weights; a basis needs an unquantised weight",
            param="target_modules",
        )
    others = [other for other in owners.get(weight.data_ptr(), []) if other != f"{name}.weight"]
    if others and weight.numel() and not weight.is_meta:
        raise UnsupportedModel(
            f"the weight of target module {name} is tied to {', '.join(others)}; leave it out",
            param="target_modules",
        )
    if not bool(torch.isfinite(weight).all()):
        bad = float(weight.detach()[~torch.isfinite(weight)][0])
        raise InvalidInput(
            f"the weight of target module {name} holds the value {bad}", param="target_modules"
        )
