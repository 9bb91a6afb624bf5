"""`python -m service`: settings, store, engine, then HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import sys

from service.engine.client.engine_client import EngineClient
from service.engine.settings import EngineSettings
from service.processes.api_workers import serve_with_workers
from service.processes.memory import return_freed_memory
from service.settings import ServiceSettings, refuse_open_door
from tessera.errors import TesseraError
from tessera.processes.log_setup import set_up_logging
from tessera.processes.tasks import new_event_loop
from tessera.redis.embedded import store_url
from tessera.settings import CommonSettings, refuse_unknown_variables, settings_parser

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve until SIGTERM or SIGINT. Return the exit status: 0 after an orderly stop, 2 for unusable
    settings, 1 if something cannot be started."""
    return_freed_memory()
    set_up_logging("service")
    try:
        common, settings = CommonSettings(), ServiceSettings()
        EngineSettings()  # only validated here; `EngineClient` reads them again
        refuse_unknown_variables(
            CommonSettings, ServiceSettings, EngineSettings, sections=("TESSERA_SERVICE_", "TESSERA_ENGINE_")
        )
        refuse_open_door(settings)
        set_up_logging("service", level=common.log_level, log_format=common.log_format)
    except (TesseraError, ValueError) as error:
        logger.error("%s", error)
        return 2
    try:
        return _serve(common, settings)
    except TesseraError as error:
        logger.error("%s", error)
        return 1


def _serve(common: CommonSettings, settings: ServiceSettings) -> int:
    if settings.workers > 1:
        return _supervise_workers(common, settings)
    engine = None
    if (url := common.store_url_with_password()) is not None:
        # The engine takes longest to load, so it begins first.
        engine = EngineClient(common, url)
        engine.start_process()
    from service.api_process import serve_alone

    return serve_alone(common, settings, engine)


def _supervise_workers(common: CommonSettings, settings: ServiceSettings) -> int:
    url, store = store_url(common)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(serve_with_workers(common, settings, url))
    finally:
        if store is not None:
            store.stop()


if __name__ == "__main__":
    settings_parser(
        "python -m service",
        "Serve the HTTP API; starts the engine process and, without TESSERA_STORE_URL, an embedded store.",
        ServiceSettings,
        EngineSettings,
        CommonSettings,
    ).parse_args()
    sys.exit(main())
