"""`python -m service`: settings, store, engine, then HTTP until told to stop."""

from __future__ import annotations

import asyncio
import logging
import sys

from service.app import create_app, load_text, stores_over
from service.engine.client.engine_client import EngineClient
from service.engine.settings import EngineSettings
from service.generation.text import TextCodec
from service.processes.api_workers import serve_with_workers
from service.processes.http_server import serve_app
from service.processes.memory import favour_event_loop, return_freed_memory
from service.processes.twin import Twin
from service.settings import ServiceSettings, refuse_open_door
from tessera.errors import TesseraError
from tessera.processes.log_setup import set_up_logging
from tessera.processes.tasks import new_event_loop
from tessera.redis.client import connect
from tessera.redis.embedded import store_url
from tessera.settings import CommonSettings, refuse_unknown_variables, settings_parser

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve. Exit status 0 after an orderly stop, 2 for unusable settings, 1 for what cannot be started."""
    return_freed_memory()
    set_up_logging("service")
    try:
        common, settings = CommonSettings(), ServiceSettings()
        EngineSettings()  # read where the engine is started; refused here
        refuse_unknown_variables(
            CommonSettings, ServiceSettings, EngineSettings, sections=("TESSERA_SERVICE_", "TESSERA_ENGINE_")
        )
        refuse_open_door(settings)
        set_up_logging("service", level=common.log_level, log_format=common.log_format)
    except (TesseraError, ValueError) as error:
        logger.error("%s", error)
        return 2
    try:
        return _serve_with_store(common, settings)
    except TesseraError as error:
        logger.error("%s", error)
        return 1


def _serve_with_store(common: CommonSettings, settings: ServiceSettings) -> int:
    text = load_text(common) if settings.workers == 1 else None  # before the store's thread
    url, store = store_url(common)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            if text is None:
                return runner.run(serve_with_workers(common, settings, url))
            return runner.run(serve(common, settings, url, *text))
    finally:
        if store is not None:
            store.stop()


async def serve(
    common: CommonSettings, settings: ServiceSettings, url: str, codec: TextCodec, twin: Twin
) -> int:
    """Serve until SIGTERM or SIGINT; requests in flight may finish. Raises what cannot be started."""
    redis = connect(url, timeout_s=common.store_timeout_s)
    try:
        app = create_app(
            engine=EngineClient(common, url),
            stores=stores_over(redis, common),
            codec=codec,
            settings=settings,
            common=common,
            twin=twin,
            store_url=url,
        )
        favour_event_loop()
        return 0 if await serve_app(app, settings) else 1
    finally:
        await redis.aclose()


if __name__ == "__main__":
    settings_parser(
        "python -m service",
        "Serve the HTTP API; starts the engine process and, without TESSERA_STORE_URL, an embedded store.",
        ServiceSettings,
        EngineSettings,
        CommonSettings,
    ).parse_args()
    sys.exit(main())
