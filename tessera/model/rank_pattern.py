"""The rank of each module, where some have another than the rest, as in PEFT's `rank_pattern`.

A key is a regular expression that must match the end of a module's name, at its beginning or after a dot:
"q_proj", "layers.[01].mlp.up_proj". The first key that matches counts. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tessera.errors import InvalidInput


def module_ranks(names: Sequence[str], rank: int, pattern: Mapping[str, int] | None) -> list[int]:
    """Return the rank of each module. rank: where no key of the pattern matches.

    Raises `InvalidInput` for a key that is no regular expression, or that matches no module first.
    """
    if not pattern:
        return [rank] * len(names)
    compiled = [(key, _compile(key), value) for key, value in pattern.items()]
    used: set[str] = set()
    ranks = []
    for name in names:
        key, value = next(((key, value) for key, p, value in compiled if p.match(name)), (None, rank))
        used |= set() if key is None else {key}
        ranks.append(value)
    for key in pattern:
        if key not in used:
            raise InvalidInput(f"{key!r} matches no module that is left to it", param="rank_pattern")
    return ranks


def _compile(key: str) -> Any:
    import re2  # only jobs with patterns need it

    options = re2.Options()
    options.log_errors, options.max_mem = False, 1024 * 1024
    try:
        return re2.compile(rf"(.*\.)?(?:{key})$", options)
    except re2.error as error:
        raise InvalidInput(f"{key!r} is not a regular expression: {error}", param="rank_pattern") from error
