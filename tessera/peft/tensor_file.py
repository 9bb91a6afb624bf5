"""Reading `adapter_model.safetensors`: its header before anything is allocated, and what names mean.

Pickled files are never opened. This module knows no method of PEFT.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.formats.manifest import ModuleShape
from tessera.peft.config import CODE, MODEL_NAME, printable

#: The header for 1,500 modules has 400 KB.
MAX_HEADER_BYTES = 8 * 1024**2
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: What PEFT writes in front of the name of a module.
PREFIX = "base_model.model."
#: Parts of a name that torch.compile, FSDP and checkpointing insert. These wrappers have no weights.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_LENGTH = struct.Struct("<Q")


def read_header(model: bytes) -> dict[str, Any]:
    """Read the header, name → {dtype, shape, data_offsets}. Raises `InvalidInput`."""
    if len(model) < _LENGTH.size:
        refuse_tensors(f"has {len(model)} bytes, too few for a safetensors file")
    (length,) = _LENGTH.unpack_from(model)
    if length > min(len(model) - _LENGTH.size, MAX_HEADER_BYTES):
        refuse_tensors("is truncated, or not a safetensors file")
    try:
        header = json.loads(model[_LENGTH.size : _LENGTH.size + length])
    except (ValueError, RecursionError) as error:
        refuse_tensors(f"has an unreadable header: {error}")
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    entries = header.items() if isinstance(header, dict) else ()
    is_sound = isinstance(metadata, dict) and all(
        name == "__metadata__" or (isinstance(entry, dict) and isinstance(entry.get("shape"), list))
        for name, entry in entries
    )
    if not is_sound:
        refuse_tensors("does not have the header of a safetensors file")
    return dict(header)


def load_tensors(model: bytes, names: Iterable[str]) -> dict[str, Tensor]:
    """Return all tensors. Raises `InvalidInput` if one of `names` holds a value that is not finite."""
    try:
        tensors = safetensors.torch.load(model)
    except (SafetensorError, ValueError, KeyError) as error:
        refuse_tensors(f"cannot be read: {error}")
    for name in names:
        if not bool(torch.isfinite(tensors[name]).all()):
            refuse_tensors(f"{printable(name)} holds a value that is not finite")
    return tensors


def check_entry(entry: Mapping[str, Any], expected: list[int], *, name: str, what: str, source: str) -> None:
    """Check a tensor's dtype and shape. what, source: the tensor in words, and where its shape comes from."""
    if str(entry.get("dtype")) not in FLOATS:
        refuse_tensors(
            f"holds {printable(name)} as {str(entry.get('dtype'))[:20]}, not as {', '.join(FLOATS)}"
        )
    if entry["shape"] != expected:
        shown = str(entry["shape"])[:40]
        refuse_tensors(f"has {what} as {shown}; {source} require {expected}")


def module_of(written: str, modules: Mapping[str, ModuleShape]) -> str:
    """Find the module of a name in the file, which may lack the prefixes of PEFT and of the model."""
    parts = [part for part in written.split(".") if part not in _WRAPPERS]
    name = ".".join(parts).removeprefix("module.").removeprefix(PREFIX)
    if name in modules:
        return name
    candidates = [module for module in modules if module.endswith(f".{name}")]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        refuse_tensors(f"changes {printable(written)}, which may mean {candidates[0]} or {candidates[1]}")
    refuse_tensors(f"changes {printable(written)}, which is not a linear layer that can carry an adapter")


def refuse_tensors(reason: str) -> NoReturn:
    raise InvalidInput(f"{MODEL_NAME}: it {reason}", param="adapter_model", code=CODE)
