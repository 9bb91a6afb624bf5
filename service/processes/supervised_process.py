"""A child process that is kept running: started, restarted when it dies, and stopped at the end.

It is polled. Does not know what the child does.
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

#: A child that keeps dying is restarted ever more slowly, so that its messages can be read.
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 10.0
#: A child that ran for this long was healthy, and is restarted quickly again.
HEALTHY_AFTER_S = 30.0


@dataclass
class SupervisedProcess:
    """One child process and when it is due to start."""

    #: The child's name in the log.
    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    #: File descriptors that the child inherits.
    pass_fds: Sequence[int] = ()
    #: Called with the child's process id when it has died.
    on_death: Callable[[int], None] = lambda pid: None
    #: None while the child does not run.
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    delay: RestartDelay = field(
        default_factory=lambda: RestartDelay(
            first_s=FIRST_BACKOFF_S, max_s=MAX_BACKOFF_S, stable_s=HEALTHY_AFTER_S
        )
    )
    start_after: float = field(default_factory=time.monotonic)

    def supervise(self) -> None:
        """Start the child if it is due, or note that it has died. Call this often, and always from the same
        thread: the child ends with the thread that started it."""
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
        logger.warning("%s ended with code %s; restarting it in %.1f s", self.name, code, delay_s)
        self.on_death(self.process.pid)
        self.process, self.start_after = None, now + delay_s

    def terminate(self) -> None:
        """Ask the child to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def stop(self, *, timeout_s: float) -> None:
        """Ask the child to end, and kill it if it has not ended after `timeout_s`."""
        self.terminate()
        if self.process is None:
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("%s did not end within %g s and was killed", self.name, timeout_s)
            self.process.kill()
            self.process.wait()
