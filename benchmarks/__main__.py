"""Run every benchmark small, one after the other: `make bench`."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "benchmarks.attention",
    "benchmarks.operators",
    "benchmarks.decode",
    "benchmarks.host",
    "benchmarks.slot_loads",
    "benchmarks.cold",
    "benchmarks.server",
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
