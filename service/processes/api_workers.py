"""Several API processes over one engine, owned by the process that started the engine.

    python -m service            the parent: starts, watches and restarts its children; answers no request
      python -m service.engine   one
      python -m service.api_worker   TESSERA_SERVICE_WORKERS of them, on one listening socket

They all write their metrics to shared files (Prometheus' multiprocess mode), so that each of them can answer
a scrape for all.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from service.engine.client.engine_child import socket_path
from service.engine.client.engine_client import EngineClient
from service.processes.supervised_process import SupervisedProcess
from service.settings import ServiceSettings
from tessera.errors import InvalidInput
from tessera.settings import CommonSettings

#: Seconds between two checks of the workers.
POLL_INTERVAL_S = 0.2
#: Time for a worker's clean-up after its last request.
STOP_MARGIN_S = 5.0
BACKLOG = 2048


async def serve_with_workers(common: CommonSettings, settings: ServiceSettings, url: str) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises `InvalidInput` if the service cannot listen on its address, and `EngineUnavailable` if there is no
    safe place for the engine's socket.
    """
    stopping = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopping.set)
    engine_socket = socket_path(common.data_dir)
    engine = EngineClient(common, url, socket=engine_socket)
    with listen(settings) as listener, tempfile.TemporaryDirectory(prefix="tessera-metrics-") as metrics_dir:
        await engine.start()
        try:
            workers = make_workers(settings.workers, listener, engine_socket, url, Path(metrics_dir))
            await supervise(workers, stopping)
            await stop(workers, timeout_s=settings.shutdown_timeout_s + STOP_MARGIN_S)
        finally:
            await engine.close()
    return 0


def listen(settings: ServiceSettings) -> socket.socket:
    """Return a socket that listens on the address of the settings. Raises `InvalidInput`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise InvalidInput(
            f"cannot listen on {settings.host}, port {settings.port}: {error}", param="TESSERA_SERVICE_PORT"
        ) from error


def make_workers(
    count: int, listener: socket.socket, engine_socket: Path, url: str, metrics_dir: Path
) -> list[SupervisedProcess]:
    """Return workers that are not started yet. metrics_dir: an empty folder for them alone."""
    environment = {**os.environ, "TESSERA_STORE_URL": url, "PROMETHEUS_MULTIPROC_DIR": str(metrics_dir)}
    arguments = ["--listen-fd", str(listener.fileno()), "--engine-socket", str(engine_socket)]

    def on_death(pid: int) -> None:
        mark_process_dead(pid, str(metrics_dir))  # type: ignore[no-untyped-call]  # its gauges, not its counts

    return [
        SupervisedProcess(
            f"API worker {number}",
            [sys.executable, "-m", "service.api_worker", *arguments],
            environment,
            pass_fds=(listener.fileno(),),
            on_death=on_death,
        )
        for number in range(1, count + 1)
    ]


async def supervise(workers: list[SupervisedProcess], stopping: asyncio.Event) -> None:
    """Keep all workers running until `stopping` is set."""
    while not stopping.is_set():
        for worker in workers:
            worker.supervise()
        try:
            async with asyncio.timeout(POLL_INTERVAL_S):
                await stopping.wait()
        except TimeoutError:
            pass


async def stop(workers: list[SupervisedProcess], *, timeout_s: float) -> None:
    """Stop all workers at the same time; their running requests may finish."""
    for worker in workers:
        worker.terminate()
    await asyncio.gather(*(asyncio.to_thread(worker.stop, timeout_s=timeout_s) for worker in workers))
