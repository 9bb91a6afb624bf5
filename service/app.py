"""The application: the one place where engine, stores, queue and routes are put together.

Everything that a route uses is made from the arguments of `create_app`, so that a test can pass a fake
engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from redis.asyncio import Redis

from service.engine.client.token_engine import TokenEngine
from service.generation.generator import Generator, heavy_gate
from service.generation.model_registry import ModelRegistry
from service.generation.text import TextCodec, load_text_codec
from service.http import errors, json_routes
from service.http.auth import ApiKeys
from service.http.idempotency import Idempotency
from service.http.json_routes import JsonBodies
from service.http.middleware import Authentication, BodyLimit, BodyLimits, RequestContext
from service.http.routes import (
    adapters,
    bases,
    basis_jobs,
    chat,
    classify,
    completions,
    files,
    fine_tuning,
    imports,
    models,
    ops,
    score,
)
from service.http.routes.deps import Services, Stores
from service.jobs import heavy_work, upload_check
from service.jobs.basis_choices import BasisChoices
from service.jobs.basis_jobs import BasisJobs
from service.jobs.estimates import JobEstimates
from service.jobs.heavy_work import HeavyWork
from service.jobs.training_jobs import TrainingJobs
from service.jobs.upload_check import UploadCheck
from service.metrics.collector import ServiceCollector, StoreSampler
from service.metrics.service_metrics import Metrics, service_version
from service.processes.twin import Twin, fork_twin
from service.settings import ServiceSettings
from tessera.errors import InvalidInput
from tessera.formats.adapter_ref import ADAPTER_DTYPES
from tessera.processes.tasks import end_tasks
from tessera.queue.client import JobQueue
from tessera.queue.worker_reports import WorkerReports
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tessera.store.checkpoints import CheckpointStore
from tessera.store.files import FileStore
from tessera.store.holds import BasisHolds
from tessera.store.manifests import BasisManifests
from tessera.store.ownership import PrivateBases

TITLE = "Tessera"
DESCRIPTION = "One base language model, millions of tiny personal adapters. OpenAI's clients work unchanged."

TENANT_ROUTERS = (
    models, completions, chat, score, classify, files, fine_tuning, adapters, imports, basis_jobs, bases,
)  # fmt: skip

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def stores_over(redis: Redis, settings: CommonSettings) -> Stores:
    """Return the stores of one Redis."""
    return Stores(
        redis,
        AdapterStore(redis),
        CheckpointStore(redis),
        BasisManifests(redis),
        PrivateBases(redis, max_bytes=settings.max_own_basis_bytes),
        FileStore(redis),
    )


def load_text(common: CommonSettings, *, close_fds: Sequence[int] = ()) -> tuple[TextCodec, Twin]:
    """Load the base model's text codec, and fork a twin of this process that processes large inputs with it.

    Call it before this process has threads. close_fds: file descriptors that the twin must not keep open.
    Raises `UnsupportedModel`.
    """
    codec = load_text_codec(
        common.base_model,
        revision=common.base_model_revision,
        allow_control_tokens=common.allow_control_tokens,
    )
    checks = upload_check.upload_works(codec.chat, max_examples=common.max_examples)
    works = checks | json_routes.json_works() | heavy_work.heavy_works(common)
    return codec, fork_twin(works, limits=heavy_work.LIMITS_BY_NAME, close_fds=close_fds)


def create_app(
    *,
    engine: TokenEngine,
    stores: Stores,
    codec: TextCodec,
    settings: ServiceSettings,
    common: CommonSettings,
    twin: Twin | None = None,
    store_url: str | None = None,
) -> FastAPI:
    """Make the application. It starts and closes the engine; the caller closes the Redis client.

    twin: processes large inputs; None: threads of this process do. store_url: the store to which forks of the
    twin connect. Raises `InvalidInput` for a key file or a setting that cannot be used.
    """
    services = _make_services(engine, stores, codec, settings, common, twin, store_url)
    sampler = StoreSampler(stores.redis, stores.adapters, services.queue)
    services.metrics.registry.register(ServiceCollector(engine, sampler))
    app = FastAPI(
        title=TITLE,
        description=DESCRIPTION,
        version=service_version(),
        lifespan=_lifespan(engine, sampler, settings.sample_interval_s),
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.services = services
    errors.install(app)
    for module in TENANT_ROUTERS:
        app.include_router(module.router, responses=errors.RESPONSES)
    app.include_router(ops.router)
    _add_middleware(app, settings, services.metrics)
    _describe_errors(app)
    return app


def _make_services(
    engine: TokenEngine,
    stores: Stores,
    codec: TextCodec,
    settings: ServiceSettings,
    common: CommonSettings,
    twin: Twin | None,
    store_url: str | None,
) -> Services:
    if common.adapter_dtype not in ADAPTER_DTYPES:
        known = ", ".join(ADAPTER_DTYPES)
        raise InvalidInput(f"adapter_dtype must be one of {known}", param="TESSERA_ADAPTER_DTYPE")
    metrics, queue, gate = Metrics(), JobQueue(stores.redis), heavy_gate()
    names = ModelRegistry(
        common.base_model, stores.adapters, stores.checkpoints, stores.private_bases, engine
    )
    basis_queue, holds = JobQueue(stores.redis, kind="basis"), BasisHolds(stores.redis, stores.private_bases)
    heavy = HeavyWork(stores.redis, common, twin=twin, store_url=store_url)
    choices = BasisChoices(
        bases=stores.bases,
        private_bases=stores.private_bases,
        holds=holds,
        files=stores.files,
        layers=heavy.layers,
        settings=common,
    )
    jobs = TrainingJobs(
        queue, names, stores.adapters, choices, settings=common, is_encoder=codec.chat.is_encoder
    )
    estimates = JobEstimates(jobs, queue, WorkerReports(stores.redis), stores.files, stores.bases)
    return Services(
        settings=settings,
        engine=engine,
        stores=stores,
        queue=queue,
        basis_queue=basis_queue,
        models=names,
        generator=Generator(engine, codec, metrics, request_timeout_s=settings.request_timeout_s, gate=gate),
        jobs=jobs,
        estimates=estimates,
        basis_jobs=BasisJobs(basis_queue, choices, base_model=names.base_name),
        holds=holds,
        heavy_work=heavy,
        idempotency=Idempotency(stores.redis),
        metrics=metrics,
        json_bodies=JsonBodies(gate, twin),
        upload_check=UploadCheck(codec.chat, twin, max_examples=common.max_examples),
    )


def _lifespan(engine: TokenEngine, sampler: StoreSampler, interval_s: float) -> Lifespan:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        sampling = asyncio.create_task(sampler.run(interval_s))
        try:
            yield
        finally:
            await end_tasks(sampling)
            await engine.close()

    return lifespan


def _add_middleware(app: FastAPI, settings: ServiceSettings, metrics: Metrics) -> None:
    """Add the middleware, innermost first."""
    limits = BodyLimits(
        settings.max_body_bytes,
        settings.max_upload_bytes,
        settings.max_import_bytes,
        settings.max_body_memory_bytes,
        settings.body_timeout_s,
    )
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(Authentication, api_keys=ApiKeys.load(settings.api_keys_file))
    app.add_middleware(RequestContext, metrics=metrics, max_requests=settings.max_concurrent_requests)


def _describe_errors(app: FastAPI) -> None:
    """Remove the framework's own error 422 from the OpenAPI schema, because here a wrong request gets a
    400."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
