"""The HTTP server round the application: uvicorn, its options, its signals."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.settings import ServiceSettings

#: A connection that is idle for longer is closed: longer than the 60 s of common proxies, so that they, not
#: we, decide which connection dies.
KEEP_ALIVE_S = 75


async def serve_app(
    app: FastAPI, settings: ServiceSettings, *, listener: socket.socket | None = None
) -> bool:
    """Serve until SIGTERM or SIGINT; requests in flight may finish. False if it could not begin.

    listener: a socket that listens already; None: one at the settings' address.
    """
    server = uvicorn.Server(_config(app, settings))

    def stop(signum: int, frame: FrameType | None) -> None:
        server.should_exit = True

    # Uvicorn raises a signal once more when it has stopped: it must not end us before we cleaned up.
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
