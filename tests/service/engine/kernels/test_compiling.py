"""The fused ops compile for a real device, even if there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
KERNELS = {"qkv_rope_kernel", "glu_kernel", "add_kernel", "row_kernel", "core_kernel", "add_deltas_kernel"}


def test_fused_ops_compile_for_sm90(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.service.engine.kernels.compiled_for_sm90"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert {name for name, _ in json.loads(result.stdout)} == KERNELS
