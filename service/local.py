"""The whole of Tessera on one machine: store, service and trainer worker, kept running until told to stop.

`python -m service.local` (or `make serve`). Starts the embedded store unless TESSERA_STORE_URL names one,
then the service and the worker as processes of their own, and starts either again if it dies. Knows nothing
of what they do: it starts modules by name.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from types import FrameType

from adapter_core.child_process import start_child
from adapter_core.embedded_store import store_url
from adapter_core.errors import TesseraError
from adapter_core.settings import CommonSettings

logger = logging.getLogger(__name__)

MODULES = ("service", "trainer_worker")
#: A child that keeps dying is started ever more slowly, so that its message can be read.
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 10.0
#: A child that ran this long was healthy: the next start is quick again.
HEALTHY_AFTER_S = 30.0
#: The service lets running streams finish before it ends.
STOP_TIMEOUT_S = 20.0


@dataclass
class Child:
    """One process that has to run."""

    module: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    backoff_s: float = FIRST_BACKOFF_S
    start_after: float = field(default_factory=time.monotonic)

    def tend(self) -> None:
        """Start the process if it is due, note its death if it died."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.start_after:
                self.process = start_child([sys.executable, "-m", self.module], environment=self.environment)
                self.started_at = now
            return
        code = self.process.poll()
        if code is None:
            return
        self.backoff_s = (
            FIRST_BACKOFF_S
            if now - self.started_at > HEALTHY_AFTER_S
            else min(2 * self.backoff_s, MAX_BACKOFF_S)
        )
        logger.warning(
            "%s ended with code %s; starting it again in %.1f s", self.module, code, self.backoff_s
        )
        self.process, self.start_after = None, now + self.backoff_s

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalStack:
    """Store, service and worker as one thing to start, tend and stop."""

    def __init__(self, settings: CommonSettings) -> None:
        url, self._store = store_url(settings)
        environment = {**os.environ, "TESSERA_STORE_URL": url}
        self._children = [Child(module, environment) for module in MODULES]

    def tend(self) -> None:
        for child in self._children:
            child.tend()

    def stop(self) -> None:
        """The worker first, so that its job is handed back while the store still answers."""
        for child in reversed(self._children):
            child.stop()
        if self._store is not None:
            self._store.stop()


def is_ready(base_url: str) -> bool:
    """Whether the service at `base_url` says that it can take requests."""
    try:
        with urllib.request.urlopen(f"{base_url}/health/ready", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        stack = LocalStack(CommonSettings())
    except (TesseraError, ValueError) as error:
        logger.error("%s", error)
        return 1
    host = os.environ.get("TESSERA_SERVICE_HOST", "127.0.0.1")
    base_url = f"http://{host}:{os.environ.get('TESSERA_SERVICE_PORT', '8000')}"
    announced = False
    try:
        while not stopping:
            stack.tend()
            if not announced and is_ready(base_url):
                announced = True
                logger.info("ready: %s/v1 (API reference: %s/docs)", base_url, base_url)
            time.sleep(0.2)
    finally:
        stack.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
