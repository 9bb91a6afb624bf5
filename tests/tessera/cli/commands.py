"""The `tessera` command as a child process, without the tests' own environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.waiting import HANG_S

ROOT = Path(__file__).parents[3]


def tessera(
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    first_on_path: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `tessera` of this checkout. first_on_path: searched before the checkout."""
    path = [str(path) for path in (first_on_path, ROOT, *_inherited()) if path]
    return subprocess.run(
        [sys.executable, "-P", "-m", "tessera.cli", *arguments],
        # Wide, so that no sentence is broken.
        env={**os.environ, "COLUMNS": "400", "PYTHONPATH": os.pathsep.join(path), **(environment or {})},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def _inherited() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
