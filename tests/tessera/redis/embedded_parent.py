"""A process with an embedded store, for tests that kill it: prints the URL, then waits to be ended.

python embedded_parent.py <data folder>
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tessera.processes.child_process import end_with_parent
from tessera.redis.embedded import EmbeddedStore

if __name__ == "__main__":
    end_with_parent()
    sys.stdout.write(EmbeddedStore(Path(sys.argv[1])).start(timeout_s=60) + "\n")
    sys.stdout.flush()
    signal.pause()
