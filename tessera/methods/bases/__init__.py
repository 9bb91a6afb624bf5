"""The methods that build a basis: one file per published method, and the registry `METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tessera.defaults import LLAMA_LINEARS
from tessera.errors import InvalidInput
from tessera.formats.basis import Basis
from tessera.methods.bases import (
    corda,
    eva,
    gradient_svd,
    lolora,
    lora_da,
    lora_ga,
    lora_one,
    lora_sb,
    lora_xs,
    loram,
    milora,
    olora,
    pissa,
    psoft,
    random_factors,
    tinylora,
)
from tessera.methods.building.build import BuildRequest, BuiltBasis, build
from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.method import Method
from tessera.methods.building.rebasing import rebase
from tessera.methods.options import Option
from tessera.methods.population import learned_basis
from tessera.methods.population.users import Population, split_users
from tessera.model.base_model import BaseModel

__all__ = [
    "METHODS",
    "BuiltBasis",
    "CalibrationSet",
    "Method",
    "Option",
    "Population",
    "build_basis",
    "build_basis_and_step",
    "find_method",
    "rebase",
    "split_users",
]

_FILES = (
    lora_xs,
    lora_sb,
    lora_da,
    loram,
    lolora,
    pissa,
    milora,
    olora,
    lora_ga,
    lora_one,
    corda,
    eva,
    gradient_svd,
    learned_basis,
    random_factors,
    tinylora,
    psoft,
)
METHODS: dict[str, Method] = {file.METHOD.name: file.METHOD for file in _FILES}


def find_method(name: str) -> Method:
    """Return the method of this name. Raises `InvalidInput`, which lists the known names."""
    if name not in METHODS:
        raise InvalidInput(f"unknown method {name!r}; known: {', '.join(METHODS)}", param="method")
    return METHODS[name]


def build_basis(
    base: BaseModel,
    *,
    method: str = "lora_xs",
    rank: int = 16,
    target_modules: Sequence[str] = LLAMA_LINEARS,
    calibration: CalibrationSet | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    **options: Any,
) -> Basis:
    """Build a basis with one of `METHODS`.

    calibration: the examples that the method reads; a `Population` also says which user each one belongs to.
    progress: called as progress(done, total) after each module, and after each step of a method that learns.
    rank_pattern: ranks of modules that have another than `rank`, by regular expression, as in PEFT. The basis
    has the largest, and zero vectors where a module has fewer. options: those of the method.

    The base model is not changed, but nobody else may use it during the call. Raises `InvalidInput` (unknown
    method or option, rank out of range, missing or insufficient calibration data, values that are not finite)
    or `UnsupportedModel` (no target module, or one with a quantised or tied weight).
    """
    request = BuildRequest(rank, target_modules, calibration, dtype, progress, options, rank_pattern)
    return build(base, find_method(method), request).basis


def build_basis_and_step(
    base: BaseModel,
    *,
    method: str,
    rank: int = 16,
    target_modules: Sequence[str] = LLAMA_LINEARS,
    calibration: CalibrationSet | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    **options: Any,
) -> BuiltBasis:
    """Build a basis as `build_basis` does, and return it with the method's own first step.

    `make_init` takes that step instead of data. LoRA-SB, LoRA-DA and LoRA-One compute basis and
    initialization from the same gradients, so this saves them a second pass over the data.
    """
    request = BuildRequest(rank, target_modules, calibration, dtype, progress, options, rank_pattern)
    return build(base, find_method(method), request)
