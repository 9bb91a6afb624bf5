"""Run every benchmark small, one after the other: `make bench`."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "benchmarks.attention",
    "benchmarks.operators",
    "benchmarks.decode",
    "benchmarks.engine.host",
    "benchmarks.engine.slot_loads",
    "benchmarks.serving.cold",
    "benchmarks.serving.server",
)


def main() -> int:
    for module in MODULES:
        sys.stdout.write(f"\n## {module}\n\n")
        sys.stdout.flush()
        if code := subprocess.run([sys.executable, "-m", module], check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
