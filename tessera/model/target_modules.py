"""The linear layers of a model that are adapted: which ones they are, and the form of their inputs.

Knows layers by their names and widths alone, and needs no torch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tessera.defaults import LLAMA_LINEARS
from tessera.errors import InvalidInput, UnsupportedModel
from tessera.formats.manifest import ModuleShape

if TYPE_CHECKING:
    from torch import Tensor

#: Parts of names that mark modules which choose experts or tokens. A small change of their scores can change
#: the choice abruptly.
_SELECTORS = {"gate", "router", "wg", "classifier", "shared_expert_gate", "indexer"}


def choose_targets(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Choose the linear layers of a model that are adapted.

    A pattern matches the last part of a dotted name or the whole name, with shell wildcards: "q_proj",
    "*.mlp.*". "all-linear" means every layer except single experts, which see only the tokens that are routed
    to them. The default, Llama's seven names, means the corresponding layers in other architectures: if a
    model does not have all seven, all linear layers of its decoder layers are chosen, except experts and
    routers.
    """
    whole = [name for name in names if "experts" not in name.split(".")]
    if set(patterns) == set(LLAMA_LINEARS):
        in_layers = [name for name in whole if any(part.isdecimal() for part in name.split("."))]
        if not set(LLAMA_LINEARS) <= {name.split(".")[-1] for name in in_layers}:
            return [name for name in in_layers if not _SELECTORS & set(name.split("."))]
    if "all-linear" in patterns:
        return whole
    return [name for name in names if is_named(name, patterns)]


def check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise `UnsupportedModel` for patterns that match no layer in `choose_targets`.

    With a misspelt name, less would be trained than the user wants. The default names may be absent (see
    there).
    """
    if choose_targets(names, patterns):
        if set(patterns) == set(LLAMA_LINEARS):
            return
        patterns = [p for p in patterns if p != "all-linear" and not any(is_named(n, [p]) for n in names)]
        if not patterns:
            return
    kinds = sorted({name.split(".")[-1] for name in names})
    raise UnsupportedModel(
        f"no linear layer matches {list(patterns)}; the model has {kinds}", param="target_modules"
    )


def is_named(name: str, patterns: Sequence[str]) -> bool:
    last = name.split(".")[-1]
    return any(fnmatch.fnmatchcase(last, p) or fnmatch.fnmatchcase(name, p) for p in patterns)


def check_rank(rank: int, module: ModuleShape) -> None:
    """Raise `InvalidInput`, with the module, if the rank exceeds the smaller side of the module."""
    side = min(module.d_in, module.d_out)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= side:
        raise InvalidInput(
            f"rank must be between 1 and {side}, the smaller side of {module.name}; got {rank}", param="rank"
        )


def by_sequence(x: Tensor, num_rows: int, length: int | None, name: str) -> Tensor:
    """View x as [num_rows, length, d], with the tokens of one sequence in each row.

    Contiguous x is not copied. Before a linear layer, some models flatten the tokens in order, [S · L, d]
    (OPT, shared experts), or add a dimension, [S, 1, L, d] (latent attention). A routed expert gets some of
    the tokens in another order.

    name: name of the module. length: None if unknown; then only [S, L, d] is accepted. Raises
    `UnsupportedModel`, with the module, if its tokens cannot be assigned to sequences.
    """
    if x.dim() == 3 and x.shape[0] == num_rows and length in (None, x.shape[1]):
        return x
    if length is None or x.shape[:-1].numel() != num_rows * length or "experts" in name.split("."):
        raise UnsupportedModel(
            f"target module {name} receives {list(x.shape)} instead of one sequence per row, so its tokens "
            "cannot be assigned to users; leave it out of the target modules",
            param="target_modules",
        )
    return x.reshape(num_rows, length, x.shape[-1])
