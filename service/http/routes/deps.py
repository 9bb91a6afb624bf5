"""The dependencies of routes, as types: a route's signature lists what it uses.

Everything comes from the `Services` that `create_app` assembles; nothing is global. All are coroutine
functions, because FastAPI would run plain functions in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Query, Request, Security
from fastapi.security import HTTPBearer
from redis.asyncio import Redis

from service.engine.client.token_engine import TokenEngine
from service.generation.generator import Generator
from service.generation.model_registry import ModelRegistry
from service.http.idempotency import Idempotency, Repetition
from service.http.json_routes import JsonBodies
from service.jobs.basis_jobs import BasisJobs
from service.jobs.estimates import JobEstimates
from service.jobs.heavy_work import HeavyWork
from service.jobs.training_jobs import TrainingJobs
from service.jobs.upload_check import UploadCheck
from service.metrics.service_metrics import Metrics
from service.settings import ServiceSettings
from tessera.errors import InvalidInput
from tessera.queue.client import Job, JobQueue
from tessera.store.adapters import AdapterStore
from tessera.store.checkpoints import CheckpointStore
from tessera.store.files import FileStore
from tessera.store.holds import BasisHolds
from tessera.store.manifests import BasisManifests
from tessera.store.ownership import PrivateBases


@dataclass(frozen=True)
class Stores:
    """The stores in Redis, one per kind of object, over one client."""

    redis: Redis
    adapters: AdapterStore
    checkpoints: CheckpointStore
    bases: BasisManifests
    private_bases: PrivateBases
    files: FileStore


@dataclass(frozen=True)
class Services:
    """Everything that routes use."""

    settings: ServiceSettings
    engine: TokenEngine
    stores: Stores
    queue: JobQueue
    basis_queue: JobQueue
    models: ModelRegistry
    generator: Generator
    jobs: TrainingJobs
    estimates: JobEstimates
    basis_jobs: BasisJobs
    holds: BasisHolds
    heavy_work: HeavyWork
    idempotency: Idempotency
    metrics: Metrics
    json_bodies: JsonBodies
    upload_check: UploadCheck


async def _get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_get_services)]

#: Only documents the scheme: `middleware.Authentication` has checked the key before the body was read.
_bearer = Security(
    HTTPBearer(auto_error=False, description="API key. Not needed if the service has no keys.")
)


async def _get_tenant(request: Request, credentials: Annotated[object, _bearer]) -> str:
    tenant: str = request.state.tenant
    return tenant


TenantDep = Annotated[str, Depends(_get_tenant)]


async def _get_models(services: ServicesDep) -> ModelRegistry:
    return services.models


async def _get_stores(services: ServicesDep) -> Stores:
    return services.stores


async def _get_queue(services: ServicesDep) -> JobQueue:
    return services.queue


ModelsDep = Annotated[ModelRegistry, Depends(_get_models)]
StoresDep = Annotated[Stores, Depends(_get_stores)]


QueueDep = Annotated[JobQueue, Depends(_get_queue)]

AfterDep = Annotated[str | None, Query(max_length=128, description="The last id of the page before.")]
_STREAM = Query(description="Follow the job until it ends, oldest first; excludes `after` and `limit`.")
LimitDep = Annotated[int, Query(ge=1, le=100, description="Items per page.")]


async def _event_page(request: Request, stream: Annotated[bool, _STREAM] = False) -> bool:
    """Whether to follow the events as a stream, which has no pages. Raises `InvalidInput`."""
    for name in ("after", "limit"):
        if stream and name in request.query_params:
            raise InvalidInput(
                f"{name} selects a page of events, but stream sends all of them; leave one of them out",
                param=name,
            )
    return stream


FollowDep = Annotated[bool, Depends(_event_page)]


async def _repetition(
    idempotency_key: Annotated[str | None, Header()] = None,
    x_stainless_retry_count: Annotated[str, Header()] = "0",
) -> Repetition:
    """Read the headers that mark a repetition of an earlier request."""
    return Repetition(key=idempotency_key, is_retry=x_stainless_retry_count not in ("", "0"))


RepetitionDep = Annotated[Repetition, Depends(_repetition)]


async def _metadata_filter(
    request: Request,
    metadata: Annotated[
        str | None,
        Query(
            description="`metadata[key]=value` selects jobs with it; `null` selects jobs without metadata."
        ),
    ] = None,
) -> Callable[[Job], bool] | None:
    """Return the filter of a list of jobs: those that have all the metadata pairs of the query."""
    prefix = "metadata["
    pairs = {
        name.removeprefix(prefix)[:-1]: value
        for name, value in request.query_params.items()
        if name.startswith(prefix)
    }
    if metadata not in (None, "null"):
        raise InvalidInput("metadata: write metadata[key]=value, or metadata=null", param="metadata")
    if metadata is not None and pairs:
        raise InvalidInput("metadata: null and metadata[key] exclude each other", param="metadata")
    if metadata is not None:
        return lambda job: not job.spec.metadata
    return (lambda job: pairs.items() <= job.spec.metadata.items()) if pairs else None


WantedDep = Annotated[Callable[[Job], bool] | None, Depends(_metadata_filter)]
