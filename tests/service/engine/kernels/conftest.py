"""Kernels are interpreted on the CPU (the environment is set in `tests/conftest.py`), or run on a device."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def interpreted() -> ModuleType:
    """The Triton implementation of the fused ops, for tensors on the CPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: see test_cuda.py")
    return importlib.import_module("service.engine.kernels.launch")
