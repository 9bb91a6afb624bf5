"""Shared by the tests of workers: a store with files, a queue, and workers that can be started."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.errors import StoreUnavailable, Unavailable
from tessera.model.base_model import BaseModel
from tessera.queue.client import Job, JobEvent, JobQueue, JobSpec
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tessera.store.files import FileStore
from tests.trainer_worker.conftest import DATA
from tests.waiting import HANG_S, wait_until
from trainer_worker.assembly import make_worker
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.settings import WorkerSettings
from trainer_worker.worker import EXIT_OK, Worker

TENANT = "acme"
_SETTINGS = {"lease_s": 60, "checkpoint_every_s": 0.2, "report_every_s": 0, "report_samples": 0}


class SilentListener:
    """A listener to the preparation of a job that ignores everything."""

    def note_modules(self, done: int, total: int) -> None:
        pass

    def note_outage(self, error: Unavailable) -> None:
        pass


class World:
    """A store with files, a queue, and workers that can be started."""

    def __init__(self, redis: Redis, base: BaseModel, chat: ChatFormat, folder: Path) -> None:
        self.redis, self.base, self.chat, self.folder = redis, base, chat, folder
        self.queue, self.files, self.adapters = JobQueue(redis), FileStore(redis), AdapterStore(redis)
        #: Common settings beside the data folder.
        self.common: dict[str, Any] = {}

    async def upload(self, content: bytes, tenant: str = TENANT) -> str:
        record = await self.files.put(tenant, filename="data.jsonl", purpose="fine-tune", content=content)
        return record.file_id

    async def submit(
        self, name: str = "devil", *, lines: int = 12, tenant: str = TENANT, epochs: int = 2, **spec: Any
    ) -> str:
        """Submit a job on the first lines of a data set, for the adapter of the same name."""
        content = b"\n".join((DATA / f"{name}.jsonl").read_bytes().split(b"\n")[:lines])
        fields = {
            "adapter_id": name, "training_file": await self.upload(content, tenant), "base_model": "tiny",
            "rank": 8, "hyperparameters": {"n_epochs": epochs, "batch_size": 2}, "seed": 7,
        } | spec  # fmt: skip
        return (await self.queue.submit(tenant, JobSpec(**fields), cost=100)).job_id

    def make_worker(self, redis: Redis | None = None, **settings: Any) -> Worker:
        """A worker that is not running yet."""
        self.metrics = TrainerMetrics()
        return make_worker(
            redis or self.redis,
            self.base,
            self.chat,
            CommonSettings(data_dir=self.folder, **self.common),
            WorkerSettings(**(_SETTINGS | settings)),
            metrics=self.metrics,
        )

    @asynccontextmanager
    async def worker(self, redis: Redis | None = None, **settings: Any) -> AsyncIterator[Worker]:
        """A running worker, stopped at the end."""
        worker = self.make_worker(redis, **settings)
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            assert await running == EXIT_OK

    async def job(self, job_id: str, tenant: str = TENANT) -> Job:
        return await self.queue.get(tenant, job_id)

    def steps_made(self) -> float:
        return self.metrics.registry.get_sample_value("tessera_trainer_optimizer_steps_total") or 0.0

    async def ended(self, job_id: str, tenant: str = TENANT, *, timeout_s: float = HANG_S) -> Job:
        async def final() -> Job | None:
            with contextlib.suppress(StoreUnavailable):
                job = await self.job(job_id, tenant)
                return job if job.status.is_final else None
            return None

        found: Job = await wait_until(final, timeout_s)
        return found

    async def under_way(self, job_id: str, step: int = 1) -> None:
        async def is_so() -> bool:
            job = await self.job(job_id)
            assert not job.status.is_final, job
            return int(job.progress.get("step", 0)) >= step

        await wait_until(is_so)

    async def events(self, job_id: str, tenant: str = TENANT) -> list[JobEvent]:
        events, _ = await self.queue.events(tenant, job_id, None, 1000)
        return events[::-1]


def messages(events: list[JobEvent], containing: str) -> list[str]:
    return [event.message for event in events if containing in event.message]
