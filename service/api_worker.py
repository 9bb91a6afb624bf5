"""`python -m service.api_worker`: one of several API processes over an engine; `python -m service` starts it.

It inherits the socket that listens, and connects to the engine's socket. All state is in the store, so any
API process can answer any request.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

from service.api_process import serve
from service.app import load_text
from service.engine.client.attachment import AttachedEngine
from service.engine.settings import EngineSettings
from service.processes.memory import return_freed_memory
from service.settings import ServiceSettings
from tessera.errors import TesseraError
from tessera.processes.log_setup import set_up_logging
from tessera.processes.tasks import new_event_loop
from tessera.settings import CommonSettings

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve until SIGTERM, which the kernel also sends when the parent ends. Return 1 if serving cannot
    start."""
    parser = argparse.ArgumentParser(prog="python -m service.api_worker", description=__doc__)
    parser.add_argument("--listen-fd", type=int, required=True, help="inherited socket that listens")
    parser.add_argument("--engine-socket", type=Path, required=True, help="where the engine listens")
    arguments = parser.parse_args()
    return_freed_memory()
    set_up_logging("api_worker")
    try:
        common = CommonSettings()
        set_up_logging("api_worker", level=common.log_level, log_format=common.log_format)
        codec, twin = load_text(common, close_fds=[arguments.listen_fd])
        url = common.store_url_with_password()
        assert url is not None, "the parent names the store"
        engine = AttachedEngine(
            arguments.engine_socket, heartbeat_timeout_s=EngineSettings().heartbeat_timeout_s
        )
        listener = socket.socket(fileno=arguments.listen_fd)
        logger.info("API process %d serves", os.getpid())
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            served = serve(common, ServiceSettings(), url, engine, codec, twin, listener=listener)
            return runner.run(served)
    except (TesseraError, ValueError) as error:
        logger.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
