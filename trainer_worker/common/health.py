"""/metrics and /health of the worker, on a port and a thread of their own."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from tessera.errors import InvalidInput
from trainer_worker.common.duties import Heartbeat


class _Server(ThreadingHTTPServer):
    """Checks the heartbeat while it waits for requests."""

    heartbeat: Heartbeat

    def service_actions(self) -> None:
        self.heartbeat.look()


class HealthServer:
    """Serves until `close` is called. Raises `InvalidInput` if the address is not available."""

    def __init__(self, host: str, port: int, *, heartbeat: Heartbeat, registry: CollectorRegistry) -> None:
        class Handler(_Handler):
            pass

        Handler.heartbeat, Handler.registry = heartbeat, registry
        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            message = f"cannot serve metrics on {host}:{port}: {error.strerror or error}"
            raise InvalidInput(message, param="TESSERA_WORKER_METRICS_PORT") from error
        self._server.daemon_threads = True
        self._server.heartbeat = heartbeat
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    heartbeat: Heartbeat
    registry: CollectorRegistry
    timeout = 10.0

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, CONTENT_TYPE_LATEST, generate_latest(self.registry))
        elif path == "/health":
            is_healthy, figures = self.heartbeat.report()
            self._answer(200 if is_healthy else 503, "application/json", json.dumps(figures).encode())
        else:
            self._answer(404, "text/plain; charset=utf-8", b"there are /metrics and /health\n")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: Prometheus sends a request every few seconds."""
