"""Assembles a worker for its first job: the base model with its chat format, and the `Worker` itself.

Importing this module loads torch and transformers, so `__main__.py` imports it only when a job is waiting.
"""

from __future__ import annotations

import torch

from tessera.chat.chat_format import ChatFormat, load_chat_format
from tessera.formats.adapter import DTYPE_NAMES
from tessera.model.base_model import BaseModel, load_base_model
from tessera.processes.log_setup import drop_library_handlers
from tessera.queue.leases import JobLeases
from tessera.queue.worker_reports import WorkerReports
from tessera.redis.client import Client
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tessera.store.checkpoints import CheckpointStore
from tessera.store.files import FileStore
from tessera.store.holds import BasisHolds
from tessera.store.ownership import PrivateBases
from trainer_worker.common.duties import Heartbeat
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.common.model_lock import ModelLock
from trainer_worker.common.pace import Pace
from trainer_worker.outcome.finish_time import PublishTime
from trainer_worker.outcome.job_reports import JobReports
from trainer_worker.outcome.publisher import Publisher
from trainer_worker.outcome.result_files import ResultFiles
from trainer_worker.outcome.samples import SampleMaker
from trainer_worker.preparing.basis_source import BasisSource
from trainer_worker.preparing.classification import ClassificationPreparation
from trainer_worker.preparing.lora import LoraPreparation
from trainer_worker.preparing.preparation import Preparation
from trainer_worker.session import WorkerServices
from trainer_worker.settings import WorkerSettings
from trainer_worker.train_loop import TrainerPool, TrainLoop
from trainer_worker.worker import Worker


def load(settings: CommonSettings, worker_settings: WorkerSettings) -> tuple[BaseModel, ChatFormat]:
    """Load the base model and its chat format. Raises `UnsupportedModel`, `InvalidInput`."""
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
    """Build a worker with all its parts. Call this in the event loop that will run it."""
    metrics, heartbeat = metrics or TrainerMetrics(), heartbeat or Heartbeat()
    adapters = AdapterStore(redis)
    pool = TrainerPool(
        base, max_runs=worker_settings.max_resident_jobs, token_budget=worker_settings.token_budget
    )
    model_lock = ModelLock(base)
    pace = Pace()
    loop = TrainLoop(pool, model_lock, metrics=metrics, heartbeat=heartbeat, pace=pace)
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
        classification=ClassificationPreparation(base, bases),
        model_lock=model_lock,
        max_tokens=worker_settings.max_tokens,
        may_search=worker_settings.learning_rate_search,
        max_examples=settings.max_examples,
    )
    dtype = DTYPE_NAMES[settings.adapter_dtype]
    services = WorkerServices(
        base=base,
        leases=JobLeases(redis),
        publisher=Publisher(
            adapters,
            store,
            own,
            holds,
            dtype=dtype,
            base_model_id=base.model_id,
            checkpoints=CheckpointStore(redis),
            keep_checkpoints=worker_settings.keep_checkpoints,
        ),
        holds=holds,
        preparation=preparation,
        loop=loop,
        metrics=metrics,
        lease_s=worker_settings.lease_s,
        checkpoint_every_s=worker_settings.checkpoint_every_s,
        report_every_s=worker_settings.report_every_s,
        log_every_s=worker_settings.log_every_s,
        publishing=PublishTime(),
        pace=pace,
        reports_of_workers=WorkerReports(redis),
        reports=JobReports(
            SampleMaker(base, chat, model_lock, max_samples=worker_settings.report_samples),
            ResultFiles(FileStore(redis)),
        ),
    )
    return Worker(services, worker_settings, heartbeat=heartbeat)
