"""From an order to train to a job in the queue: which adapter, which basis, which files.

Knows no HTTP. Needs neither the engine nor a worker: an order is accepted while both are down.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from adapter_core.bases import METHODS, SELF_BUILDING
from adapter_core.basis_store import BasisStore
from adapter_core.errors import InvalidInput, NotFound
from adapter_core.file_store import FileRecord, FileStore
from adapter_core.job_queue import Job, JobEvent, JobQueue, JobSpec
from adapter_core.settings import CommonSettings
from adapter_core.store import AdapterStore
from service.model_names import Models

#: What fairness between tenants counts is tokens; English text has about 4 bytes per token.
BYTES_PER_TOKEN = 4
#: Epochs that "auto" is reckoned with here; the trainer decides by the number of examples.
AUTO_EPOCHS = 3
#: Adapter ids have 64 characters at most: room for "-" and 8 hex digits.
_MAX_SLUG = 55
#: Events are read in pages of this many.
_EVENTS_PAGE = 100


@dataclass(frozen=True)
class JobOrder:
    """What a caller wants trained. None: the default, or for adapter_id a new name made from suffix."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    adapter_id: str | None = None
    rank: int | None = None
    method: str | None = None
    basis_id: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    early_stopping: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _BasisChoice:
    basis_id: str | None
    method: str
    rank: int
    warm_start_from: str | None = None


class TrainingJobs:
    """The jobs of all tenants, as their owners order and follow them."""

    def __init__(
        self,
        queue: JobQueue,
        models: Models,
        adapters: AdapterStore,
        bases: BasisStore,
        files: FileStore,
        *,
        settings: CommonSettings,
    ) -> None:
        self._queue = queue
        self._models = models
        self._adapters = adapters
        self._bases = bases
        self._files = files
        self._settings = settings

    async def submit(self, tenant: str, order: JobOrder, *, dedupe_key: str) -> Job:
        """Queue the job, once per dedupe_key. Raises `NotFound` (model, file, basis) and `InvalidInput`."""
        training = await self._file(tenant, order.training_file, "training_file")
        if order.validation_file is not None:
            await self._file(tenant, order.validation_file, "validation_file")
        choice = await self._choose_basis(tenant, order)
        adapter_id = order.adapter_id or self._new_id(order.suffix)
        self._models.check_new_id(adapter_id)
        spec = JobSpec(
            adapter_id=adapter_id,
            generation=await self._adapters.generation(tenant, adapter_id),
            training_file=order.training_file,
            validation_file=order.validation_file,
            base_model=self._models.base_name,
            method=choice.method,
            rank=choice.rank,
            basis_id=choice.basis_id,
            warm_start_from=choice.warm_start_from,
            hyperparameters=order.hyperparameters,
            early_stopping=order.early_stopping,
            seed=secrets.randbelow(2**31) if order.seed is None else order.seed,
            suffix=order.suffix,
            metadata=order.metadata,
        )
        cost = estimate_cost(training, order.hyperparameters)
        return await self._queue.submit(tenant, spec, cost=cost, dedupe_key=dedupe_key)

    async def follow(self, tenant: str, job_id: str) -> AsyncGenerator[tuple[list[JobEvent], bool], None]:
        """Endlessly: the events, oldest first, that came since the last look, and whether the job has ended.

        Whoever reads decides when to look again. Raises `NotFound`.
        """
        newest: str | None = None
        while True:
            job = await self._queue.get(tenant, job_id)  # before the events: its last one must not be missed
            events = await self._events_since(tenant, job_id, newest)
            newest = events[-1].event_id if events else newest
            yield events, job.status.is_final

    async def _events_since(self, tenant: str, job_id: str, newest: str | None) -> list[JobEvent]:
        found: list[JobEvent] = []
        has_more, after = True, None
        while has_more:
            page, has_more = await self._queue.events(tenant, job_id, after, _EVENTS_PAGE)
            for event in page:
                if event.event_id == newest:
                    return found[::-1]
                found.append(event)
            after = page[-1].event_id if page else None
        return found[::-1]

    async def _file(self, tenant: str, file_id: str, param: str) -> FileRecord:
        try:
            return await self._files.get(tenant, file_id)
        except NotFound as error:
            raise NotFound(error.message, param=param, code=error.code) from error

    async def _choose_basis(self, tenant: str, order: JobOrder) -> _BasisChoice:
        """Of the adapter to start from, as named, or to be built by method and rank."""
        target = await self._models.resolve(tenant, order.model)
        if target.adapter is not None:
            start = f"{target.adapter.adapter_id}@{target.adapter.version}"
            if order.basis_id not in (None, target.adapter.basis_id):
                raise InvalidInput(f"{start} belongs to another basis", param="adapter.basis")
            return await self._stored_basis(order, target.adapter.basis_id, start)
        if order.basis_id is not None:
            return await self._stored_basis(order, order.basis_id)
        method = order.method or self._settings.method
        if method not in SELF_BUILDING:
            raise InvalidInput(_refusal(method), param="adapter.method")
        return _BasisChoice(None, method, order.rank or self._settings.rank)

    async def _stored_basis(
        self, order: JobOrder, basis_id: str, warm_start_from: str | None = None
    ) -> _BasisChoice:
        try:
            manifest = await self._bases.manifest(basis_id)
        except NotFound as error:
            raise NotFound(error.message, param="adapter.basis", code=error.code) from error
        for param, wanted, given in (
            ("adapter.rank", order.rank, manifest.rank),
            ("adapter.method", order.method, manifest.method),
        ):
            if wanted not in (None, given):
                raise InvalidInput(f"{param} is {given!r} in basis {basis_id}, not {wanted!r}", param=param)
        return _BasisChoice(basis_id, manifest.method, manifest.rank, warm_start_from)

    def _new_id(self, suffix: str | None) -> str:
        return f"{slug(suffix or '') or slug(self._models.base_name) or 'adapter'}-{secrets.token_hex(4)}"


def _refusal(method: str) -> str:
    if method not in METHODS:
        return f"unknown method {method!r}; a job can build the basis of: {', '.join(SELF_BUILDING)}"
    return (
        f"method {method!r} builds its basis from calibration data, which a job does not carry: one basis is "
        f"meant for many users; a job can build the basis of: {', '.join(SELF_BUILDING)}"
    )


def slug(text: str) -> str:
    """`text` in the alphabet of adapter ids, which starts with a letter or digit; may be empty."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:_MAX_SLUG].rstrip("._-")


def estimate_cost(file: FileRecord, hyperparameters: dict[str, Any]) -> int:
    """Tokens that a job will train on, about."""
    epochs = hyperparameters.get("n_epochs", "auto")
    tokens: int = file.bytes // BYTES_PER_TOKEN
    return max(1, tokens * (AUTO_EPOCHS if epochs == "auto" else int(epochs)))
