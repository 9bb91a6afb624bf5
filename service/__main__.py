"""`python -m service`: settings, store, engine, then HTTP until told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from adapter_core.embedded_store import store_url
from adapter_core.errors import TesseraError
from adapter_core.redis_client import connect
from adapter_core.settings import CommonSettings, refuse_unknown_variables
from service.app import create_app, stores_over
from service.engine.client import EngineClient
from service.engine.settings import EngineSettings
from service.settings import ServiceSettings, refuse_open_door
from service.text import TextCodec, load_text_codec

logger = logging.getLogger(__name__)

#: A connection that is idle for longer is closed: longer than the 60 s of common proxies, so that they, not
#: we, decide which connection dies.
KEEP_ALIVE_S = 75


def main() -> int:
    """Serve. Exit status 0 after an orderly stop, 2 for unusable settings, 1 for what cannot be started."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        common, settings = CommonSettings(), ServiceSettings()
        refuse_unknown_variables(
            CommonSettings, ServiceSettings, EngineSettings, sections=("TESSERA_SERVICE_", "TESSERA_ENGINE_")
        )
        refuse_open_door(settings)
        logging.getLogger().setLevel(common.log_level)
    except (TesseraError, ValueError) as error:
        logger.error("%s", error)
        return 2
    try:
        return _serve_with_store(common, settings)
    except TesseraError as error:
        logger.error("%s", error)
        return 1


def _serve_with_store(common: CommonSettings, settings: ServiceSettings) -> int:
    codec = load_text_codec(common.base_model, revision=common.base_model_revision)
    url, store = store_url(common)
    try:
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            return runner.run(serve(common, settings, codec, url))
    finally:
        if store is not None:
            store.stop()


async def serve(common: CommonSettings, settings: ServiceSettings, codec: TextCodec, url: str) -> int:
    """Serve until SIGTERM or SIGINT; requests in flight may finish. Raises what cannot be started."""
    redis = connect(url, timeout_s=common.store_timeout_s)
    try:
        app = create_app(
            engine=EngineClient(common, url),
            stores=stores_over(redis, common),
            codec=codec,
            settings=settings,
            common=common,
        )
        server = uvicorn.Server(_uvicorn_config(app, settings))
        _stop_on_signals(server)
        await server.serve()
        return 0 if server.started else 1
    finally:
        await redis.aclose()


def _uvicorn_config(app: FastAPI, settings: ServiceSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http="httptools",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.shutdown_timeout_s),
    )


def _stop_on_signals(server: uvicorn.Server) -> None:
    """Uvicorn raises a signal once more when it has stopped: it must not end us before we cleaned up."""

    def stop(signum: int, frame: FrameType | None) -> None:
        server.should_exit = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not made for this system
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


if __name__ == "__main__":
    sys.exit(main())
