"""Which linear layers of a model are adapted, by their names and widths alone. Needs no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from tessera.defaults import LLAMA_LINEARS
from tessera.errors import InvalidInput, UnsupportedModel
from tessera.formats.manifest import ModuleShape

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
