"""Settings, supervisors and API processes load none of the libraries that compute: each would keep 300 MB."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers")
LIGHT = (
    "tessera.settings",
    "service.settings",
    "service.engine.settings",
    "trainer_worker.settings",
    "service.local",
    "service.__main__",
    "service.processes.api_workers",
    "trainer_worker.__main__",
)


def loaded(module: str, names: tuple[str, ...]) -> list[str]:
    """Which of the libraries a process has loaded that has imported this module and nothing else."""
    program = f"import sys, {module}; print(*(name for name in {names} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return result.stdout.split()


@pytest.mark.parametrize("module", ["service.api_process", "service.api_worker"])
def test_an_api_process_loads_no_torch(module: str) -> None:
    assert loaded(module, HEAVY) == ["transformers"], "the part of it that turns text into tokens"


@pytest.mark.parametrize("module", LIGHT)
def test_settings_and_supervisors_load_no_heavy_library(module: str) -> None:
    assert loaded(module, (*HEAVY, "fastapi")) == []
