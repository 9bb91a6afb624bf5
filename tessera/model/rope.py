"""One set of rotations for all texts, independent of the other texts in a batch.

"longrope" (Phi-3-mini-128k, Phi-3.5, Phi-4-mini) has short and long factors, and transformers uses the long
ones as soon as one position of the pass lies beyond the original context. In a batch of several users, an
answer would then change with its neighbours; and as a text grows, the keys in the cache would no longer match
the queries. So one set is chosen for good: the one for the longest text that is served. Training uses the
same set.

    num_positions <= original_max_position_embeddings     short factors
    num_positions >  original_max_position_embeddings     long factors, for short texts too

"dynamic" scales with the length of the text, but only above `max_position_embeddings`, where serving ends.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: Kinds of rotation that depend on the position alone.
_STATIC = {"default", "linear", "llama3", "yarn", "proportional"}

#: Attribute of a module: the number of positions for which its rotation was chosen.
_PINNED = "tessera_num_positions"


def pin_rotations(model: nn.Module, num_positions: int | None) -> int | None:
    """Fix rotations that depend on the longest position of a batch to those for `num_positions`.

    None makes them depend on the batch again. Returns the number of positions that they were fixed to before.
    """
    before: int | None = None
    for name, module in model.named_modules():
        kinds = _batch_dependent_kinds(module)
        if not kinds:
            continue
        if not hasattr(module, _PINNED):
            module.register_forward_pre_hook(_add_last_position, with_kwargs=True)
            module.register_forward_hook(_drop_last_position)
        before = getattr(module, _PINNED, None)
        setattr(module, _PINNED, num_positions)
        if num_positions is not None:
            logger.info(
                "%s (%s) uses the rotations for a text of %d tokens", name, ", ".join(kinds), num_positions
            )
    return before


def depends_on_batch(module: nn.Module) -> bool:
    """Return whether the rotations of a module depend on the longest position of a batch."""
    return bool(_batch_dependent_kinds(module)) and getattr(module, _PINNED, None) is None


def _batch_dependent_kinds(module: nn.Module) -> list[str]:
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        kinds = {"": kinds}
    return sorted(set(kinds.values()) - _STATIC) if isinstance(kinds, dict) else []


def _add_last_position(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Extend position_ids [..., T], the second argument of every rotation, to [..., T + 1]."""
    num_positions = getattr(module, _PINNED)
    if num_positions is None:
        return args, kwargs
    positions: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    last = torch.full_like(positions[..., :1], num_positions - 1)
    longer = torch.cat([positions, last], -1)
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": longer}
    return (args[0], longer, *args[2:]), kwargs


def _drop_last_position(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Drop the added position. output: angles [..., T + 1, D], or their cosine and sine."""
    if getattr(module, _PINNED) is None:
        return output
    if isinstance(output, Tensor):
        return output[..., :-1, :]
    return tuple(part[..., :-1, :] for part in output)
