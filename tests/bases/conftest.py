"""A small random model and calibration data of it, once per session."""

from __future__ import annotations

import pytest

from adapter_core.base_model import BaseModel
from adapter_core.bases import CalibrationSet
from tests.bases.matrices import small_calibration, small_model


@pytest.fixture(scope="session")
def small() -> BaseModel:
    """A Llama of two layers, 32 wide, float32. Do not modify it."""
    return small_model()


@pytest.fixture(scope="session")
def calibration() -> CalibrationSet:
    """Twelve examples of 9 to 27 random tokens, the second half of each labelled."""
    return small_calibration()
