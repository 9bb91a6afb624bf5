"""`python -m trainer_worker`: train queued jobs until SIGTERM or SIGINT, then give back the unfinished.

Until its first job a worker holds neither torch nor a model (`idle.py`).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable

from tessera.errors import InvalidInput, TesseraError
from tessera.formats.adapter_ref import ADAPTER_DTYPES
from tessera.processes.log_setup import set_up_logging
from tessera.queue.leases import JobLeases
from tessera.queue.worker_reports import WorkerReports
from tessera.redis.client import connect
from tessera.redis.embedded import store_url
from tessera.settings import CommonSettings, settings_parser
from trainer_worker.common.duties import Heartbeat
from trainer_worker.common.health import HealthServer
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.idle import IdleWorker
from trainer_worker.settings import WorkerSettings, read_settings

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED = 0, 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main() -> int:
    """Run the worker; returns 0 after a signal, 1 for a configuration or a device that does not work."""
    set_up_logging("trainer")
    try:
        settings, worker_settings = read_settings()
    except (TesseraError, ValueError) as error:
        logger.error("%s", error)
        return EXIT_FAILED
    set_up_logging("trainer", level=settings.log_level, log_format=settings.log_format)
    store = None
    try:
        if settings.adapter_dtype not in ADAPTER_DTYPES:
            known = ", ".join(ADAPTER_DTYPES)
            raise InvalidInput(f"adapter_dtype must be one of {known}", param="TESSERA_ADAPTER_DTYPE")
        url, store = store_url(settings)
        return asyncio.run(serve(url, settings, worker_settings))
    except TesseraError as error:
        logger.error("%s", error)
        return EXIT_FAILED
    finally:
        if store is not None:
            store.stop()


async def serve(url: str, settings: CommonSettings, worker_settings: WorkerSettings) -> int:
    """Run a worker with its health server until a signal; returns the exit status."""
    metrics, heartbeat = TrainerMetrics(), Heartbeat()
    redis = connect(url, timeout_s=settings.store_timeout_s)
    idle = IdleWorker(
        JobLeases(redis),
        worker_settings,
        metrics=metrics,
        heartbeat=heartbeat,
        reports=WorkerReports(redis),
    )
    health = open_health(worker_settings, metrics, heartbeat)
    try:
        on_signal(idle.stop)
        if not worker_settings.load_at_start and not await idle.wait_for_first_job():
            return EXIT_OK
        on_signal(None)  # while the model loads, no job is held, so the process may simply end
        base, chat = await idle.load(settings)
        from trainer_worker.assembly import make_worker

        worker = make_worker(
            redis, base, chat, settings, worker_settings, metrics=metrics, heartbeat=heartbeat
        )
        on_signal(worker.stop)
        return await worker.run()
    finally:
        if health is not None:
            await asyncio.to_thread(health.close)
        await redis.aclose()


def on_signal(stop: Callable[[], None] | None) -> None:
    """Call `stop` on SIGTERM or SIGINT; with None the signals end the process."""
    loop = asyncio.get_running_loop()
    for name in _SIGNALS:
        if stop is None:
            loop.remove_signal_handler(name)
        else:
            loop.add_signal_handler(name, stop)


def open_health(
    settings: WorkerSettings, metrics: TrainerMetrics, heartbeat: Heartbeat
) -> HealthServer | None:
    """Start the server of /metrics and /health; None if it is off, or if the default port is in use."""
    if settings.metrics_port == 0:
        return None
    try:
        return HealthServer(
            settings.metrics_host, settings.metrics_port, heartbeat=heartbeat, registry=metrics.registry
        )
    except InvalidInput as error:
        if "metrics_port" in settings.model_fields_set:
            raise
        logger.warning("%s; the worker goes on without it", error)
        return None


if __name__ == "__main__":
    settings_parser(
        "python -m trainer_worker",
        "Train queued jobs until SIGTERM or SIGINT, then give back the unfinished ones.",
        WorkerSettings,
        CommonSettings,
    ).parse_args()
    sys.exit(main())
