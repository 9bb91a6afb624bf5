"""Start a process that does not outlive the one that started it.

Two things have to happen between fork and exec: ask the kernel to end the child with its parent, and take a
lock that lives as long as the child. Neither may run in the forked copy of a threaded process, so this file
is also a script that runs in between. It needs only the standard library.

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
    working_directory: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command`. On Linux it receives SIGTERM when the calling *thread* ends, for whatever reason.

    So call this from a thread that lives as long as the child should. The child gets its own session: Ctrl-C
    reaches only the parent, which then stops its children in order. command[0] must be an absolute path.
    lock_file: a file that is locked (flock) from before the program begins until it ends; the child waits for
    the lock. pass_fds: descriptors that the child inherits under the same numbers. Raises `FileNotFoundError`
    if command[0] cannot be run.
    """
    if not os.access(command[0], os.X_OK):
        raise FileNotFoundError(f"{command[0]} does not exist or is not executable")
    launcher = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(lock_file or "")]
    return subprocess.Popen(
        [*launcher, *command],
        env=environment,
        cwd=working_directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        pass_fds=pass_fds,
    )


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the thread that started it ends (on Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))


def main(parent: int, lock_file: str, command: list[str]) -> None:
    """Replace this process by `command`, or return if the parent has already ended."""
    end_with_parent()  # on other systems the child must watch its parent itself
    if os.getppid() != parent:
        return
    if lock_file:
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)  # the previous child may still be writing its last bytes
        os.set_inheritable(lock, True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
