"""The paged attention kernels compile for a GPU: the interpreter accepts code that the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.engine.kernels.paged_configs import Phase, find_config
from tests.waiting import HANG_S

pytest.importorskip("triton")

ROOT = Path(__file__).parents[4]


def test_kernels_compile_for_hopper_within_the_shared_memory_foreseen(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.service.engine.kernels.compile_paged", "90"]

    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=HANG_S
    )

    assert done.returncode == 0, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in compiled] == [
        *("cut_work", "cut_work", "add_parts", "keep_kv"),
        *("attend_items", "attend_items"),
    ]
    for phase, (_, shared_bytes) in zip(Phase, compiled[-2:], strict=True):
        foreseen = find_config(phase, 128, 128, 2).shared_bytes(128, 128, 2)
        assert int(shared_bytes) <= 1.05 * foreseen  # a small part is for reductions
