"""/metrics and /health of the worker, on a port and a thread of their own.

The worker is healthy while its event loop runs and its training thread is not stuck in one step. The thread
of the health server measures both by looking at the heartbeat, so a pause of the whole process does not
count. Health does not depend on the store: a worker that cannot reach it goes on training, and a restart
would not help.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from tessera.errors import InvalidInput

#: The event loop beats every second; silence for this long means that it is stuck.
MAX_SILENCE_S = 15.0
#: A step of 8,192 tokens through an 8B model takes 0.6 s on an H100; minutes mean a stuck device.
MAX_STEP_S = 300.0
#: At most this much of the time between two looks counts. The server's thread looks every half second; a
#: later look was delayed by a pause of the whole process or by a machine without a free processor.
MAX_LOOK_S = 2.0


class Heartbeat:
    """Measures how long the event loop has been silent and how long the training thread has been in a step.

    All methods may be called from any thread. The reader of the report calls `look` regularly, because only
    time between two punctual looks counts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        self._silent_s = self._step_s = 0.0
        self._is_in_step = False
        self._guard = threading.Lock()
        self.num_jobs = 0
        #: The base model is loaded for the first job.
        self.model: Literal["not loaded", "loading", "loaded"] = "not loaded"

    def beat(self) -> None:
        with self._guard:
            self._silent_s = 0.0

    def begin_step(self) -> None:
        with self._guard:
            self._is_in_step, self._step_s = True, 0.0

    def end_step(self) -> None:
        with self._guard:
            self._is_in_step, self._step_s = False, 0.0

    def look(self) -> None:
        with self._guard:
            now = self._clock()
            elapsed_s, self._looked_at = min(now - self._looked_at, MAX_LOOK_S), now
            self._silent_s += elapsed_s
            if self._is_in_step:
                self._step_s += elapsed_s

    def report(self) -> tuple[bool, dict[str, Any]]:
        """Whether the worker is healthy, and the figures."""
        self.look()
        silent_s, step_s = self._silent_s, self._step_s
        is_healthy = silent_s < MAX_SILENCE_S and step_s < MAX_STEP_S
        status = "ok" if is_healthy else "stuck"
        return is_healthy, {
            "status": status,
            "jobs": self.num_jobs,
            "model": self.model,
            "event_loop_silent_s": round(silent_s, 3),
            "step_s": round(step_s, 3),
        }


class _Server(ThreadingHTTPServer):
    """Looks at the heartbeat while it waits for requests."""

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
