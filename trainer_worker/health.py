"""/metrics and /health of the worker, on a port and a thread of their own.

Healthy means: the event loop beats, and the training thread is not stuck in one step. Neither waits for the
store: a worker that cannot reach it goes on training, and restarting it would not help.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from adapter_core.errors import InvalidInput

#: The event loop beats every second; silence for this long means that it is stuck.
MAX_SILENCE_S = 15.0
#: A step of 8,192 tokens through an 8B model takes 0.6 s on an H100; minutes mean a stuck device.
MAX_STEP_S = 300.0


class Heartbeat:
    """When the event loop last turned and since when the training thread is in its step. For any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beat_at = clock()
        self._step_began_at: float | None = None
        self.num_jobs = 0

    def beat(self) -> None:
        self._beat_at = self._clock()

    def begin_step(self) -> None:
        self._step_began_at = self._clock()

    def end_step(self) -> None:
        self._step_began_at = None

    def report(self) -> tuple[bool, dict[str, Any]]:
        """Whether all is well, and the figures."""
        now, began = self._clock(), self._step_began_at
        silent_s = now - self._beat_at
        step_s = 0.0 if began is None else now - began
        is_healthy = silent_s < MAX_SILENCE_S and step_s < MAX_STEP_S
        status = "ok" if is_healthy else "stuck"
        return is_healthy, {
            "status": status,
            "jobs": self.num_jobs,
            "event_loop_silent_s": round(silent_s, 3),
            "step_s": round(step_s, 3),
        }


class HealthServer:
    """Serves until `close`. Raises `InvalidInput` if the address cannot be had."""

    def __init__(self, host: str, port: int, *, heartbeat: Heartbeat, registry: CollectorRegistry) -> None:
        class Handler(_Handler):
            pass

        Handler.heartbeat, Handler.registry = heartbeat, registry
        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            message = f"cannot serve metrics on {host}:{port}: {error.strerror or error}"
            raise InvalidInput(message, param="TESSERA_WORKER_METRICS_PORT") from error
        self._server.daemon_threads = True
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
        """A scrape every few seconds is no news."""
