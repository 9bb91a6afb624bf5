"""The delay before a process that ended is started again."""

from __future__ import annotations


class RestartDelay:
    """Doubles from start to start, up to a limit, until a process has run for `stable_s`.

    Everything that starts processes uses this, so that no process is restarted again and again without a
    pause: a start costs seconds of processor time, and many starts do not help a machine that is too busy.
    """

    def __init__(self, *, first_s: float, max_s: float, stable_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._max_s = max_s
        self._stable_s = stable_s

    def after(self, served_s: float) -> float:
        """Return the seconds to wait after a process has ended that had worked for `served_s`."""
        if served_s >= self._stable_s:
            self._next_s = self._first_s
        delay_s, self._next_s = self._next_s, min(2 * self._next_s, self._max_s)
        return delay_s
