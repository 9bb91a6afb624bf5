"""All of Tessera on one machine: store, service and trainer worker, kept running until a signal ends them.

`python -m service.local` (or `make serve`) starts the embedded store unless TESSERA_STORE_URL names one, then
the service and the worker as separate processes, and restarts either if it dies. It knows nothing of what
they do: it starts modules by name.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from types import FrameType

from service.processes.supervised_process import SupervisedProcess
from tessera.errors import TesseraError
from tessera.processes.log_setup import set_up_logging
from tessera.redis.embedded import store_url
from tessera.settings import CommonSettings, settings_parser

logger = logging.getLogger(__name__)

MODULES = ("service", "trainer_worker")
#: The service lets running streams finish before it ends.
STOP_TIMEOUT_S = 20.0


class LocalStack:
    """Store, service and worker as one thing to start, supervise and stop."""

    def __init__(self, settings: CommonSettings) -> None:
        url, self._store = store_url(settings)
        environment = {**os.environ, "TESSERA_STORE_URL": url}
        self._children = [
            SupervisedProcess(module, [sys.executable, "-m", module], environment) for module in MODULES
        ]

    def supervise(self) -> None:
        """Start the children that are not running, if they are due."""
        for child in self._children:
            child.supervise()

    def stop(self) -> None:
        """Stop the worker first, so that it can release its job while the store still answers."""
        for child in reversed(self._children):
            child.stop(timeout_s=STOP_TIMEOUT_S)
        if self._store is not None:
            self._store.stop()


def is_ready(base_url: str) -> bool:
    """Whether the service at `base_url` reports that it is ready."""
    try:
        with urllib.request.urlopen(f"{base_url}/health/ready", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> int:
    """Run everything until SIGTERM or SIGINT. Return the exit status."""
    set_up_logging("local")
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        settings = CommonSettings()
        # Always at INFO, so that the line with the address is written.
        set_up_logging("local", log_format=settings.log_format)
        stack = LocalStack(settings)
    except (TesseraError, ValueError) as error:
        logger.error("%s", error)
        return 1
    host = os.environ.get("TESSERA_SERVICE_HOST", "127.0.0.1")
    base_url = f"http://{host}:{os.environ.get('TESSERA_SERVICE_PORT', '8000')}"
    announced = False
    try:
        while not stopping:
            stack.supervise()
            if not announced and is_ready(base_url):
                announced = True
                logger.info("ready: %s/v1 (API reference: %s/docs)", base_url, base_url)
            time.sleep(0.2)
    finally:
        stack.stop()
    return 0


if __name__ == "__main__":
    settings_parser(
        "python -m service.local",
        "Run store, service and trainer worker on this machine until SIGTERM or SIGINT. The settings of the "
        "two processes that it starts: `python -m service --help` and `python -m trainer_worker --help`.",
        CommonSettings,
    ).parse_args()
    sys.exit(main())
