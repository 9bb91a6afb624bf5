"""Run the application in uvicorn: its options and its signals."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.settings import ServiceSettings

#: Connections that are idle for longer are closed. This is longer than the 60 s of common proxies, so that
#: the proxy and not the service decides which connection ends.
KEEP_ALIVE_S = 75


async def serve_app(
    app: FastAPI, settings: ServiceSettings, *, listener: socket.socket | None = None
) -> bool:
    """Serve until SIGTERM or SIGINT; requests in flight may finish. Returns False if the server could not
    start.

    listener: a socket that already listens; None: listen on the address of the settings.
    """
    server = uvicorn.Server(_config(app, settings))

    def stop(signum: int, frame: FrameType | None) -> None:
        server.should_exit = True

    # Uvicorn raises the signal again when it has stopped. It must not end the process before the clean-up.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    await server.serve(sockets=None if listener is None else [listener])
    return server.started


def _config(app: FastAPI, settings: ServiceSettings) -> uvicorn.Config:
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
