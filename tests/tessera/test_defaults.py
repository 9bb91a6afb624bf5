"""What stands in light modules as plain data agrees with the registries of torch's side."""

from __future__ import annotations

import torch

from tessera.defaults import BUNDLED_MODEL, SELF_BUILDING
from tessera.formats.adapter import DTYPE_NAMES
from tessera.formats.adapter_ref import ADAPTER_DTYPES
from tessera.formats.basis import DTYPES
from tessera.formats.manifest import ITEM_BYTES
from tessera.methods.bases import METHODS


def test_methods_that_need_no_data() -> None:
    assert (
        tuple(name for name, method in METHODS.items() if method.needs_calibration == "none") == SELF_BUILDING
    )


def test_the_bundled_model_is_there() -> None:
    assert (BUNDLED_MODEL / "config.json").is_file()


def test_sizes_and_names_of_dtypes_are_torchs() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES
    assert [str(DTYPE_NAMES[name]) for name in ADAPTER_DTYPES] == [f"torch.{name}" for name in ADAPTER_DTYPES]
    assert all(isinstance(dtype, torch.dtype) for dtype in DTYPES.values())
