"""Whether another process hangs, or was only kept from running: what a supervisor may hold against its child.

The clock goes on while a machine is suspended, a container is paused or a process waits for a processor.
Nobody works in that time, so it says nothing about anybody's health. Supervisors therefore count looks of
their own (a look that comes late is one look, whatever the clock says) and ask here whether the other side
could run.
"""

from __future__ import annotations

import psutil


class RunnableTime:
    """How much of the time between two looks a thread of some process could have used.

    pid: None if the process is not known; then all of the time counts. thread: its kernel id; None for the
    main thread.
    """

    def __init__(self, pid: int | None, thread: int | None = None) -> None:
        self.pid = pid
        self._thread = thread
        self._starved_s = self._read_starved_s()

    def since_last_look_s(self, look_s: float, *, may_be_stopped: bool = False) -> float:
        """`look_s` without the seconds in which the thread was ready to run and got no processor.

        may_be_stopped: a process that somebody stopped (SIGSTOP, a debugger) could not run at all. Only right
        where nobody waits for it: one that is stopped at work has to be replaced like one that hangs.
        """
        before, self._starved_s = self._starved_s, self._read_starved_s()
        if may_be_stopped and self.pid is not None and is_stopped(self.pid):
            return 0.0
        return max(0.0, look_s - max(0.0, self._starved_s - before))

    def _read_starved_s(self) -> float:
        """Seconds on a run queue since the thread began, by the kernel's word; 0 where it does not say."""
        if self.pid is None:
            return 0.0
        try:
            with open(f"/proc/{self.pid}/task/{self._thread or self.pid}/schedstat") as file:
                return int(file.read().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger keeps the process from running."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False
