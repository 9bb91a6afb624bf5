"""`python -m service.api_worker`: one of several API processes over an engine; `python -m service` starts it.

It inherits the socket that listens, and finds the engine at the engine's own. Whatever may differ between
API processes is kept in the store, so any of them can answer any request.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

from service.app import create_app, load_text, stores_over
from service.engine.client.attachment import AttachedEngine
from service.engine.settings import EngineSettings
from service.generation.text import TextCodec
from service.processes.http_server import serve_app
from service.processes.memory import favour_event_loop, return_freed_memory
from service.processes.twin import Twin
from service.settings import ServiceSettings
from tessera.errors import TesseraError
from tessera.processes.log_setup import set_up_logging
from tessera.processes.tasks import new_event_loop
from tessera.redis.client import connect
from tessera.settings import CommonSettings

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve until SIGTERM, which the end of the parent brings too. Exit status 1 for what cannot start."""
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
        place = (arguments.listen_fd, arguments.engine_socket)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(serve(common, *place, codec, twin))
    except (TesseraError, ValueError) as error:
        logger.error("%s", error)
        return 1


async def serve(
    common: CommonSettings,
    listen_fd: int,
    engine_socket: Path,
    codec: TextCodec,
    twin: Twin,
) -> int:
    settings = ServiceSettings()
    url = common.store_url_with_password()
    assert url is not None, "the parent names the store"
    redis = connect(url, timeout_s=common.store_timeout_s)
    try:
        timeout_s = EngineSettings().heartbeat_timeout_s
        app = create_app(
            engine=AttachedEngine(engine_socket, heartbeat_timeout_s=timeout_s),
            stores=stores_over(redis, common),
            codec=codec,
            settings=settings,
            common=common,
            twin=twin,
            store_url=url,
        )
        logger.info("API process %d serves", os.getpid())
        favour_event_loop()
        return 0 if await serve_app(app, settings, listener=socket.socket(fileno=listen_fd)) else 1
    finally:
        await redis.aclose()


if __name__ == "__main__":
    sys.exit(main())
