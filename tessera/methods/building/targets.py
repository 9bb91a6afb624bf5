"""The layers for which a basis is built: found and checked before any work, and split into groups.

This file knows nothing of methods or data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera.errors import InvalidInput, UnsupportedModel
from tessera.formats.manifest import ModuleShape
from tessera.model.base_model import iter_target_modules
from tessera.model.rank_pattern import module_ranks
from tessera.model.target_modules import check_rank

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """One target module of the base model."""

    shape: ModuleShape
    linear: nn.Linear

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def weight(self) -> Tensor:
        """[d_out, d_in], the base model's own weight, which is never written to."""
        return self.linear.weight.detach()

    @property
    def layer(self) -> str:
        """The dotted name up to its first number, which names the decoder layer."""
        parts = self.name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
        return ".".join(parts[: numbers[0] + 1]) if numbers else self.name


def find_targets(
    model: nn.Module, patterns: Sequence[str], rank: int, rank_pattern: Mapping[str, int] | None = None
) -> list[Target]:
    """Return all target modules in model order, checked for a basis of this rank.

    Raises `UnsupportedModel` (no match, a quantised or a tied weight) or `InvalidInput` (the rank, or a
    weight that is not finite); the message names the module and the value.
    """
    owners = _owners_of_weights(model)
    targets = []
    for name, linear in iter_target_modules(model, patterns):
        _check_weight(name, linear, owners)
        targets.append(Target(ModuleShape(name, linear.in_features, linear.out_features), linear))
    ranks = module_ranks([target.name for target in targets], rank, rank_pattern)
    for target, own_rank in zip(targets, ranks, strict=True):
        check_rank(own_rank, target.shape)
    return targets


def layer_groups(
    targets: Sequence[Target], bytes_per_target: Sequence[int], limit_bytes: int
) -> Iterator[range]:
    """Yield runs of whole layers as ranges of indices, each of at most `limit_bytes` or of one layer."""
    first = size = layer_start = 0
    for index in range(1, len(targets) + 1):
        if index < len(targets) and targets[index].layer == targets[layer_start].layer:
            continue
        layer_size = sum(bytes_per_target[layer_start:index])
        if layer_start > first and size + layer_size > limit_bytes:
            yield range(first, layer_start)
            first, size = layer_start, 0
        size += layer_size
        layer_start = index
    if targets:
        yield range(first, len(targets))


def module_groups(
    targets: Sequence[Target], bytes_per_target: Sequence[int], limit_bytes: int
) -> Iterator[range]:
    """Yield groups like `layer_groups`, but split layers above `limit_bytes`, down to single modules."""
    for group in layer_groups(targets, bytes_per_target, limit_bytes):
        first, size = group.start, 0
        for index in group:
            if index > first and size + bytes_per_target[index] > limit_bytes:
                yield range(first, index)
                first, size = index, 0
            size += bytes_per_target[index]
        yield range(first, group.stop)


def _owners_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the parameters at each address; more than one name means that they are tied."""
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
