"""Distinguishing a process that hangs from one that could not run.

The clock continues while a machine is suspended, a container is paused or a process waits for a processor. No
process works in that time, so it says nothing about their health. Supervisors therefore count their own
checks (a late check is one check, whatever the clock says) and ask here for how long the other process could
run.
"""

from __future__ import annotations

import psutil


class RunnableTime:
    """Measures how much of the time between two checks a thread of another process could have used.

    pid: None if the process is not known; then all of the time counts. thread: kernel id of the thread; None
    means the main thread.
    """

    def __init__(self, pid: int | None, thread: int | None = None) -> None:
        self.pid = pid
        self._thread = thread
        self._starved_s = self._read_starved_s()

    def since_last_look_s(self, look_s: float, *, may_be_stopped: bool = False) -> float:
        """Return `look_s` minus the seconds in which the thread was ready to run but got no processor.

        may_be_stopped: return 0 for a process that was stopped (SIGSTOP, a debugger), as it could not run at
        all. Only correct if no one waits for it: a process that is stopped while it works must be replaced
        like one that hangs.
        """
        before, self._starved_s = self._starved_s, self._read_starved_s()
        if may_be_stopped and self.pid is not None and is_stopped(self.pid):
            return 0.0
        return max(0.0, look_s - max(0.0, self._starved_s - before))

    def _read_starved_s(self) -> float:
        """Return the seconds that the thread has spent on a run queue; 0 where the kernel does not tell."""
        if self.pid is None:
            return 0.0
        try:
            with open(f"/proc/{self.pid}/task/{self._thread or self.pid}/schedstat") as file:
                return int(file.read().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0


def is_stopped(pid: int) -> bool:
    """Return whether a signal or a debugger keeps the process from running."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False
