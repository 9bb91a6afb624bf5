"""Start a process that does not outlive the one that started it.

What has to happen between fork and exec (ask the kernel to end the child with its parent, take a lock that
lives as long as the child) must not run in the forked copy of a threaded process, so this file is also a
script, run in between; standard library only.

    python -I -S child_process.py <pid of the parent> <lock file or ""> <program> <argument> ...
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1


def start_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    output: int | IO[bytes] | None = None,
    lock_file: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command`; on Linux it gets SIGTERM when the calling *thread* ends, however that ends.

    So call it from a thread that lives as long as the child should. The child gets its own session: Ctrl-C
    reaches the parent alone, which then stops its children in order. lock_file: locked (flock) before the
    program begins and until it ends; waited for. pass_fds: inherited under their numbers. command[0] is an
    absolute path. Raises `FileNotFoundError` if that is no program.
    """
    if not os.access(command[0], os.X_OK):
        raise FileNotFoundError(f"{command[0]} is no program that can be run")
    launcher = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(lock_file or "")]
    return subprocess.Popen(
        [*launcher, *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        pass_fds=pass_fds,
    )


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the thread that started it ends (Linux alone)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))


def main(parent: int, lock_file: str, command: list[str]) -> None:
    """Replace this process by `command`; return instead if the parent is gone already."""
    end_with_parent()  # on other systems the child must look after its parent by itself
    if os.getppid() != parent:
        return
    if lock_file:
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)  # the one before this may still be writing its last bytes
        os.set_inheritable(lock, True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
