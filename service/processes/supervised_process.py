"""A process that has to run: started, started again when it dies, stopped in the end. It is polled.

Knows nothing of what it does.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tessera.processes.child_process import start_child
from tessera.processes.restarts import RestartDelay

logger = logging.getLogger(__name__)

#: A child that keeps dying is started ever more slowly, so that its message can be read.
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 10.0
#: A child that ran this long was healthy: the next start is quick again.
HEALTHY_AFTER_S = 30.0


@dataclass
class SupervisedProcess:
    """name: for the log. pass_fds: file descriptors that it inherits. on_death: called with its pid."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    pass_fds: Sequence[int] = ()
    on_death: Callable[[int], None] = lambda pid: None
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    delay: RestartDelay = field(
        default_factory=lambda: RestartDelay(
            first_s=FIRST_BACKOFF_S, max_s=MAX_BACKOFF_S, stable_s=HEALTHY_AFTER_S
        )
    )
    start_after: float = field(default_factory=time.monotonic)

    def supervise(self) -> None:
        """Start the process if it is due, note its death if it died. Always call it from the same thread:
        the child ends with the one that started it."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.start_after:
                self.process = start_child(self.command, environment=self.environment, pass_fds=self.pass_fds)
                self.started_at = now
            return
        code = self.process.poll()
        if code is None:
            return
        delay_s = self.delay.after(now - self.started_at)
        logger.warning("%s ended with code %s; starting it again in %.1f s", self.name, code, delay_s)
        self.on_death(self.process.pid)
        self.process, self.start_after = None, now + delay_s

    def terminate(self) -> None:
        """Ask it to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def stop(self, *, timeout_s: float) -> None:
        """Ask it to end, wait, and kill it after `timeout_s`."""
        self.terminate()
        if self.process is None:
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("%s does not end; killed", self.name)
            self.process.kill()
            self.process.wait()
