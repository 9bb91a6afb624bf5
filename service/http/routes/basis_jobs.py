"""Jobs that build a basis: POST /v1/bases submits them, and /v1/bases/jobs follows them."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.http.event_stream import IN_OPENAPI
from service.http.json_routes import JsonRoute
from service.http.routes.deps import (
    AfterDep,
    FollowDep,
    LimitDep,
    RepetitionDep,
    ServicesDep,
    TenantDep,
    WantedDep,
)
from service.http.routes.job_events import events_page, events_stream
from service.http.routes.job_shapes import job_error, seconds
from service.http.schemas.bases import BasisJob, BasisJobRequest
from service.http.schemas.common import Page, page_of
from service.http.schemas.training import JobEventObject
from service.jobs.basis_jobs import BasisRequest
from service.jobs.recipes import ParamNames, RecipeRequest
from tessera.queue.client import Job

router = APIRouter(prefix="/v1/bases", tags=["bases"], route_class=JsonRoute)

#: The names of a recipe's parts in a request to this resource.
NAMES = ParamNames("method", "options", "rank", "calibration_file", "target_modules")


@router.post("", operation_id="create_basis", status_code=202)
async def create_basis(
    body: BasisJobRequest,
    tenant: TenantDep,
    services: ServicesDep,
    repetition: RepetitionDep,
) -> BasisJob:
    """Queue a job that builds a basis. If the same basis was built before from the same data, it is found at
    once."""

    async def submit(key: str) -> Job:
        return await services.basis_jobs.submit(tenant, _basis_request(body), dedupe_key=f"basis:{key}")

    fingerprint, idempotency = f"basis {body.model_dump_json()}", services.idempotency
    return _object(await idempotency.create_once(tenant, repetition, fingerprint, submit, scope="basis "))


@router.get("/jobs", operation_id="list_basis_jobs")
async def list_basis_jobs(
    tenant: TenantDep,
    services: ServicesDep,
    is_wanted: WantedDep,
    after: AfterDep = None,
    limit: LimitDep = 20,
) -> Page[BasisJob]:
    """The caller's basis jobs, newest first. `metadata` selects those that have it."""
    jobs, has_more = await services.basis_queue.list(tenant, after, limit, is_wanted=is_wanted)
    return page_of([_object(job) for job in jobs], has_more)


@router.get("/jobs/{job_id}", operation_id="get_basis_job")
async def get_basis_job(job_id: str, tenant: TenantDep, services: ServicesDep) -> BasisJob:
    """One basis job as it is now."""
    return _object(await services.basis_queue.get(tenant, job_id))


@router.post("/jobs/{job_id}/cancel", operation_id="cancel_basis_job")
async def cancel_basis_job(job_id: str, tenant: TenantDep, services: ServicesDep) -> BasisJob:
    """Cancel a job: at once if no worker has it, otherwise after the current module or batch."""
    return _object(await services.basis_queue.cancel(tenant, job_id))


@router.get(
    "/jobs/{job_id}/events",
    operation_id="list_basis_job_events",
    response_model=Page[JobEventObject],
    responses=IN_OPENAPI,
)
async def list_basis_job_events(
    job_id: str,
    tenant: TenantDep,
    services: ServicesDep,
    stream: FollowDep,
    after: AfterDep = None,
    limit: LimitDep = 20,
) -> Page[JobEventObject] | Response:
    """A job's events, newest first; with `stream`, all of them as server-sent events while they arrive."""
    if stream:
        interval_s = services.settings.ping_interval_s
        return await events_stream(services.basis_queue, tenant, job_id, ping_interval_s=interval_s)
    return await events_page(services.basis_queue, tenant, job_id, after, limit)


def _basis_request(body: BasisJobRequest) -> BasisRequest:
    recipe = RecipeRequest(
        body.method,
        dict(body.options),
        body.calibration_file,
        None if body.target_modules is None else sorted(set(body.target_modules)),
        names=NAMES,
    )
    return BasisRequest(recipe, body.rank, body.metadata or {})


def _object(job: Job) -> BasisJob:
    spec = job.spec
    return BasisJob(
        id=job.job_id,
        created_at=int(job.created_at),
        started_at=seconds(job.started_at),
        finished_at=seconds(job.finished_at),
        status=job.status.value,
        basis=(job.result or {}).get("basis_id"),
        method=spec.method,
        rank=spec.rank,
        target_modules=spec.target_modules,
        options=spec.basis_options,
        calibration_file=spec.calibration,
        progress=job.progress,
        result=job.result,
        error=job_error(job.error),
        metadata=spec.metadata,
        attempt=job.attempt,
        queue_position=job.queue_position,
    )
