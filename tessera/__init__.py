"""One base language model and millions of tiny personal adapters: the library.

    >>> import torch
    >>> from tessera import Adapter, build_basis, load_base_model
    >>> base = load_base_model("models/tiny", device="cpu")  # a directory or a hub id
    >>> basis = build_basis(base, method="lora_xs", rank=8)  # frozen A and B, shared by all users
    >>> R = torch.zeros(basis.num_modules, basis.rank, basis.rank)  # one user's numbers; training fills them
    >>> adapter = Adapter(basis.basis_id, R, metadata={"user": "anna"})
    >>> packed = adapter.to_bytes(version=1)  # what the store keeps
    >>> print(f"{len(packed):,} bytes for {basis.num_modules} modules at rank {basis.rank}")
    5,519 bytes for 42 modules at rank 8
    >>> Adapter.from_bytes(packed, basis_id=basis.basis_id).metadata
    {'user': 'anna'}

The names of `__all__` are loaded when they are first used: `import tessera` takes no torch.

The library knows no HTTP, no scheduler and no training loop; those are the applications `service` and
`trainer_worker` of the repository. Dimension letters used in every docstring:

    T tokens in the flattened batch    N sequences        S slots (adapters resident on the device)
    M target modules                   L decoder layers   r rank        V vocabulary
    d_in, d_out width of a linear layer's input and output
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessera.errors import TesseraError
    from tessera.formats.adapter import Adapter
    from tessera.formats.basis import Basis
    from tessera.methods.bases import build_basis
    from tessera.model.base_model import BaseModel, load_base_model

    __version__: str

__all__ = [
    "Adapter",
    "BaseModel",
    "Basis",
    "TesseraError",
    "__version__",
    "build_basis",
    "load_base_model",
]

#: The module that defines each name that this package re-exports.
_MODULES = {
    "Adapter": "tessera.formats.adapter",
    "BaseModel": "tessera.model.base_model",
    "Basis": "tessera.formats.basis",
    "TesseraError": "tessera.errors",
    "build_basis": "tessera.methods.bases",
    "load_base_model": "tessera.model.base_model",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'tessera' has no attribute {name!r}")
    globals()[name] = value  # so that it is looked up once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tessera-adapters")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0"
