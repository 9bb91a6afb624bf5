"""`python -m trainer_worker`: train queued jobs until SIGTERM or SIGINT, then give back the unfinished."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import torch

from tessera.chat.chat_format import ChatFormat, load_chat_format
from tessera.errors import InvalidInput, TesseraError
from tessera.formats.adapter import DTYPE_NAMES
from tessera.model.base_model import BaseModel, load_base_model
from tessera.processes.log_setup import drop_library_handlers, set_up_logging
from tessera.queue.leases import JobLeases
from tessera.redis.client import Client, connect
from tessera.redis.embedded import store_url
from tessera.settings import CommonSettings, settings_parser
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tessera.store.files import FileStore
from tessera.store.holds import BasisHolds
from tessera.store.ownership import PrivateBases
from trainer_worker.common.health import HealthServer, Heartbeat
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.common.model_lock import ModelLock
from trainer_worker.outcome.publisher import Publisher
from trainer_worker.preparing.basis_source import BasisSource
from trainer_worker.preparing.lora import LoraPreparation
from trainer_worker.preparing.preparation import Preparation
from trainer_worker.session import WorkerServices
from trainer_worker.settings import WorkerSettings, read_settings
from trainer_worker.train_loop import TrainerPool, TrainLoop
from trainer_worker.worker import EXIT_FAILED, Worker

logger = logging.getLogger(__name__)


def main() -> int:
    """The exit status: 0 after a signal, 1 for a configuration or a device that does not work."""
    set_up_logging("trainer")
    try:
        settings, worker_settings = read_settings()
    except (TesseraError, ValueError) as error:
        logger.error("%s", error)
        return EXIT_FAILED
    set_up_logging("trainer", level=settings.log_level, log_format=settings.log_format)
    store = None
    try:
        url, store = store_url(settings)
        base, chat = load(settings, worker_settings)
        return asyncio.run(serve(url, base, chat, settings, worker_settings))
    except TesseraError as error:
        logger.error("%s", error)
        return EXIT_FAILED
    finally:
        if store is not None:
            store.stop()


def load(settings: CommonSettings, worker_settings: WorkerSettings) -> tuple[BaseModel, ChatFormat]:
    """The base model and its chat format. Raises `UnsupportedModel`, `InvalidInput`."""
    if settings.adapter_dtype not in DTYPE_NAMES:
        raise InvalidInput(
            f"adapter_dtype must be one of {', '.join(DTYPE_NAMES)}", param="TESSERA_ADAPTER_DTYPE"
        )
    if worker_settings.threads is not None:
        torch.set_num_threads(worker_settings.threads)
    source, revision = settings.base_model, settings.base_model_revision
    drop_library_handlers()  # transformers is imported by now
    base = load_base_model(
        source,
        revision=revision,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
    )
    chat = load_chat_format(source, revision=revision, allow_control_tokens=settings.allow_control_tokens)
    return base, chat


def make_worker(
    redis: Client,
    base: BaseModel,
    chat: ChatFormat,
    settings: CommonSettings,
    worker_settings: WorkerSettings,
    *,
    metrics: TrainerMetrics | None = None,
    heartbeat: Heartbeat | None = None,
) -> Worker:
    """A worker and everything it needs. Call it in the event loop that will run it."""
    metrics, heartbeat = metrics or TrainerMetrics(), heartbeat or Heartbeat()
    adapters = AdapterStore(redis)
    pool = TrainerPool(
        base, max_runs=worker_settings.max_resident_jobs, token_budget=worker_settings.token_budget
    )
    model_lock = ModelLock(base)
    loop = TrainLoop(pool, model_lock, metrics=metrics, heartbeat=heartbeat)
    own = PrivateBases(redis, max_bytes=settings.max_own_basis_bytes)
    holds = BasisHolds(redis, own)
    store = BasisStore(redis, cache_dir=settings.data_dir / "cache" / "bases")
    bases = BasisSource(
        base,
        model_lock,
        bases=store,
        own=own,
        holds=holds,
        target_modules=settings.target_modules,
    )
    preparation = Preparation(
        base,
        chat,
        files=FileStore(redis),
        adapters=adapters,
        bases=bases,
        lora=LoraPreparation(base, model_lock, holds=holds, target_modules=settings.target_modules),
        model_lock=model_lock,
        max_tokens=worker_settings.max_tokens,
    )
    dtype = DTYPE_NAMES[settings.adapter_dtype]
    services = WorkerServices(
        base=base,
        leases=JobLeases(redis),
        publisher=Publisher(adapters, store, own, holds, dtype=dtype, base_model_id=base.model_id),
        holds=holds,
        preparation=preparation,
        loop=loop,
        metrics=metrics,
        lease_s=worker_settings.lease_s,
        checkpoint_every_s=worker_settings.checkpoint_every_s,
        report_every_s=worker_settings.report_every_s,
    )
    return Worker(services, worker_settings, heartbeat=heartbeat)


async def serve(
    url: str, base: BaseModel, chat: ChatFormat, settings: CommonSettings, worker_settings: WorkerSettings
) -> int:
    """Run a worker, with its health port, until a signal; returns the exit status."""
    metrics, heartbeat = TrainerMetrics(), Heartbeat()
    redis = connect(url, timeout_s=settings.store_timeout_s)
    worker = make_worker(redis, base, chat, settings, worker_settings, metrics=metrics, heartbeat=heartbeat)
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, worker.stop)
    health = open_health(worker_settings, metrics, heartbeat)
    try:
        return await worker.run()
    finally:
        if health is not None:
            await asyncio.to_thread(health.close)
        await redis.aclose()


def open_health(
    settings: WorkerSettings, metrics: TrainerMetrics, heartbeat: Heartbeat
) -> HealthServer | None:
    """The server of /metrics and /health. A port that was not asked for by name may be taken: then none."""
    if settings.metrics_port == 0:
        return None
    try:
        return HealthServer(
            settings.metrics_host, settings.metrics_port, heartbeat=heartbeat, registry=metrics.registry
        )
    except InvalidInput as error:
        if "metrics_port" in settings.model_fields_set:
            raise
        logger.warning("%s; going on without", error)
        return None


if __name__ == "__main__":
    settings_parser(
        "python -m trainer_worker",
        "Train queued jobs until SIGTERM or SIGINT, then hand back the unfinished ones.",
        WorkerSettings,
        CommonSettings,
    ).parse_args()
    sys.exit(main())
