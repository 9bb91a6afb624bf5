"""One API process: the application over an engine and a store, served until a signal ends the process.

Importing this module loads FastAPI and transformers' tokenizers, so `service/__main__.py` imports it late:
after the engine has been started, or not at all where it only supervises API workers.
"""

from __future__ import annotations

import asyncio
import socket

from service.app import create_app, load_text, stores_over
from service.engine.client.engine_client import EngineClient
from service.engine.client.token_engine import TokenEngine
from service.generation.text import TextCodec
from service.processes.http_server import serve_app
from service.processes.memory import favour_event_loop
from service.processes.twin import Twin
from service.settings import ServiceSettings
from tessera.processes.tasks import new_event_loop
from tessera.redis.client import connect
from tessera.redis.embedded import store_url
from tessera.settings import CommonSettings


def serve_alone(common: CommonSettings, settings: ServiceSettings, engine: EngineClient | None) -> int:
    """Serve as the only API process, which owns the engine. Return the exit status.

    engine: one whose process has been started; None: it is made when the URL of the store is known. Raises
    `TesseraError` if the store, the text codec or the engine cannot be used.
    """
    codec, twin = load_text(common)  # before an embedded store starts its thread
    url, store = store_url(common)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            served = serve(common, settings, url, engine or EngineClient(common, url), codec, twin)
            return runner.run(served)
    finally:
        if store is not None:
            store.stop()


async def serve(
    common: CommonSettings,
    settings: ServiceSettings,
    url: str,
    engine: TokenEngine,
    codec: TextCodec,
    twin: Twin,
    *,
    listener: socket.socket | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; requests in flight may finish. Return the exit status.

    url: URL of the store. listener: a socket that listens already; None: listen on the settings' address.
    """
    redis = connect(url, timeout_s=common.store_timeout_s)
    try:
        app = create_app(
            engine=engine,
            stores=stores_over(redis, common),
            codec=codec,
            settings=settings,
            common=common,
            twin=twin,
            store_url=url,
        )
        favour_event_loop()
        return 0 if await serve_app(app, settings, listener=listener) else 1
    finally:
        await redis.aclose()
