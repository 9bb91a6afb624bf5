"""Find which earlier tokens each layer of a model attends to, from the masks that the model itself would
build.

A model that attends through our function builds no mask. So a window that is in the mask only (PhiMoE) would
be lost, and a window that is in the arguments only (OLMoE has none in its mask) would be invented. Here one
token goes through the model under the name of an attention implementation that does take masks. transformers
describes masks by functions of two positions, so the pattern can be read far beyond that token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from service.engine.attention.reference import NotPageable, implementation_of

_NAME = "tessera_asks_for_masks"

#: Two positions of queries. Windows are far shorter than either, and the two differ in their distance to the
#: start of a chunk.
_QUERIES = (2**20, 2**20 - 4099)
#: Markers of patterns that are no window: something else, or one in which tokens see later ones.
_ODD, _LATER = 0, -1
#: Number of keys to check before and behind each end of a window.
_NUM_NEAR = 64

#: For the pass that runs on this thread, the window of each layer according to its mask; None for all earlier
#: tokens.
_windows: ContextVar[dict[int, int | None] | None] = ContextVar("windows", default=None)


class AttendsToLaterTokens(Exception):
    """The result of a token depends on later tokens, so nothing of it can be cached."""


class _Mask(Tensor):
    """A mask that knows its pattern, as long as the model passes it on unchanged."""

    #: False where the pattern could not be read.
    is_known: bool
    #: None if every earlier token is seen; `_ODD`, `_LATER`.
    window: int | None


@torch.inference_mode()
def read_windows(model: PreTrainedModel) -> dict[int, int | None]:
    """Return for each layer the number of tokens it attends to, the query's own included; None for all
    earlier ones.

    Leaves out layers with a mask that was not seen, and all layers of a model that cannot be run this way.

    Raises `AttendsToLaterTokens`, and `NotPageable` for a layer that attends in another pattern.
    """
    before = implementation_of(model)
    windows: dict[int, int | None] = {}
    token = _windows.set(windows)
    try:
        model.set_attn_implementation(_NAME)
        zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        model(input_ids=zero, position_ids=zero, use_cache=False)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError):
        return {}
    finally:
        _windows.reset(token)
        model.set_attn_implementation(before)
    if _LATER in windows.values():
        raise AttendsToLaterTokens
    if _ODD in windows.values():
        raise NotPageable("a layer that attends neither to all earlier tokens nor to a window of them")
    return windows


def _describe(*, mask_function: Callable[..., Tensor], device: torch.device, **_: Any) -> Tensor:
    """Stands in for building a mask: returns an empty one that knows its pattern."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).as_subclass(_Mask)
    try:
        mask.window, mask.is_known = _window(mask_function, device), True
    except (IndexError, RuntimeError):  # it is defined for the tokens of this pass only
        mask.window, mask.is_known = None, False
    return mask


def _note(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Stands in for attention: reads the layer's mask. query: [1, Hq, 1, D_k]; returns [1, 1, Hq, D_v]."""
    windows = _windows.get()
    if windows is not None and isinstance(attention_mask, _Mask) and attention_mask.is_known:
        windows[int(module.layer_idx)] = attention_mask.window  # type: ignore[arg-type]
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


def _window(allows: Callable[..., Tensor], device: torch.device) -> int | None:
    """Return the window of two queries if they have the same pattern, otherwise `_ODD`."""
    first, second = (_window_of(allows, query, device) for query in _QUERIES)
    return first if first == second else _ODD


def _window_of(allows: Callable[..., Tensor], query: int, device: torch.device) -> int | None:
    """Return the window of one query, found by bisection and checked around its ends and at many places
    between."""

    def sees(keys: Tensor) -> Tensor:
        seen = allows(0, 0, torch.tensor(query, device=device), keys)
        return torch.as_tensor(seen, device=device).expand(keys.shape)

    low, high = 0, query + 1  # the first visible key is in low .. high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bool(sees(torch.tensor(middle, device=device))) else (middle + 1, high)
    near = torch.arange(-_NUM_NEAR, _NUM_NEAR, device=device)
    keys = torch.cat([near + low, near + query, torch.arange(0, query, 997, device=device)])
    keys = keys[keys >= 0]
    if bool(sees(keys[keys > query]).any()):
        return _LATER
    if low > query or not torch.equal(sees(keys), (keys >= low) & (keys <= query)):
        return _ODD
    return query + 1 - low if low > 0 else None


AttentionInterface.register(_NAME, _note)
AttentionMaskInterface.register(_NAME, _describe)
