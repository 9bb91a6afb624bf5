"""Becomes the embedded store's server. Run as a script by `embedded_store.py`; standard library only.

A step of its own between fork and exec: what has to happen there (ask the kernel to end the server with its
parent, take a lock that lives as long as the server) must not run in the forked copy of a threaded process.

    python -I -S store_process.py <pid of the parent> <lock file> <server binary> <server argument> ...
"""

import ctypes
import fcntl
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, lock_file: str, command: list[str]) -> None:
    """Replace this process by `command`; return (without a server) if the parent is gone already."""
    if sys.platform == "linux":  # elsewhere the next holder of the store ends a server without a parent
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != parent:
        return
    lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # the server before this one may still be writing its last bytes
    os.set_inheritable(lock, True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
