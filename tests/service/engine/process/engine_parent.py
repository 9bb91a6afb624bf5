"""A process that starts another one as its child, prints its pid, and waits to be killed.

python engine_parent.py <command> <argument> ...     " --parent <own pid>" is appended
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tessera.processes.child_process import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    child = subprocess.Popen([*sys.argv[1:], "--parent", str(os.getpid())])
    sys.stdout.write(f"{child.pid}\n")
    sys.stdout.flush()
    time.sleep(600)
