"""Ways to build a basis, one file per published method, and the registry that names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from adapter_core.base_model import LLAMA_LINEARS, BaseModel
from adapter_core.bases import lora_xs
from adapter_core.basis import Basis
from adapter_core.errors import InvalidInput

#: (base, *, rank, target_modules, dtype, progress, **the method's own options) -> Basis
BuildBasis = Callable[..., Basis]

METHODS: dict[str, BuildBasis] = {"lora_xs": lora_xs.build}


def build_basis(
    base: BaseModel,
    *,
    method: str = "lora_xs",
    rank: int = 16,
    target_modules: Sequence[str] = LLAMA_LINEARS,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Basis:
    """Build a basis by one of `METHODS`. progress(done, total) is called after each module.

    Raises `InvalidInput` (unknown method, rank out of range) or `UnsupportedModel` (no target module).
    """
    if method not in METHODS:
        raise InvalidInput(f"unknown method {method!r}; known: {', '.join(METHODS)}", param="method")
    return METHODS[method](
        base, rank=rank, target_modules=target_modules, dtype=dtype, progress=progress, **options
    )
