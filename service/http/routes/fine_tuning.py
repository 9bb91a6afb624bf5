"""/v1/fine_tuning/jobs: training jobs, in OpenAI's shape."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.http.event_stream import IN_OPENAPI
from service.http.json_routes import JsonRoute
from service.http.routes.deps import (
    AfterDep,
    FollowDep,
    LimitDep,
    QueueDep,
    RepetitionDep,
    ServicesDep,
    StoresDep,
    TenantDep,
    WantedDep,
)
from service.http.routes.job_events import events_page, events_stream
from service.http.routes.job_shapes import checkpoints_of, estimate_object, job_object, job_request
from service.http.schemas.common import Page, page_of
from service.http.schemas.training import (
    Checkpoint,
    FineTuningJob,
    FineTuningJobRequest,
    JobEstimate,
    JobEventObject,
)
from tessera.errors import NotFound
from tessera.queue.client import Job

router = APIRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"], route_class=JsonRoute)


@router.post("/jobs", operation_id="create_fine_tuning_job")
async def create_job(
    body: FineTuningJobRequest,
    tenant: TenantDep,
    services: ServicesDep,
    repetition: RepetitionDep,
) -> FineTuningJob:
    """Queue a job that trains an adapter. A repeated `Idempotency-Key`, or a retry, returns the same job."""

    async def submit(key: str) -> Job:
        return await services.jobs.submit(tenant, job_request(body), dedupe_key=key)

    fingerprint = body.model_dump_json()
    return job_object(await services.idempotency.create_once(tenant, repetition, fingerprint, submit))


@router.post("/jobs/estimate", operation_id="estimate_fine_tuning_job")
async def estimate_job(body: FineTuningJobRequest, tenant: TenantDep, services: ServicesDep) -> JobEstimate:
    """Check a job as its creation would, and estimate what it will do. Nothing is queued."""
    return estimate_object(await services.estimates.estimate(tenant, job_request(body)))


@router.get("/jobs", operation_id="list_fine_tuning_jobs")
async def list_jobs(
    tenant: TenantDep,
    queue: QueueDep,
    is_wanted: WantedDep,
    after: AfterDep = None,
    limit: LimitDep = 20,
) -> Page[FineTuningJob]:
    """The caller's jobs, newest first. `metadata` selects those that have it."""
    jobs, has_more = await queue.list(tenant, after, limit, is_wanted=is_wanted)
    return page_of([job_object(job) for job in jobs], has_more)


@router.get("/jobs/{job_id}", operation_id="get_fine_tuning_job")
async def get_job(job_id: str, tenant: TenantDep, services: ServicesDep) -> FineTuningJob:
    """One job as it is now."""
    job = await services.queue.get(tenant, job_id)
    return job_object(job, queued_finish=await services.estimates.finish_of(job))


@router.post("/jobs/{job_id}/cancel", operation_id="cancel_fine_tuning_job")
async def cancel_job(job_id: str, tenant: TenantDep, queue: QueueDep, stores: StoresDep) -> FineTuningJob:
    """Cancel a job: at once if no worker has it, otherwise at its next step."""
    job = await queue.cancel(tenant, job_id)
    if job.status.is_final:  # otherwise its worker drops its states
        await stores.checkpoints.drop(tenant, job.spec.adapter_id, job_id=job.job_id)
    return job_object(job)


@router.post("/jobs/{job_id}/stop", operation_id="stop_fine_tuning_job")
async def stop_job(job_id: str, tenant: TenantDep, queue: QueueDep) -> FineTuningJob:
    """Let a job end now as succeeded: its worker publishes the best state so far."""
    return job_object(await queue.stop(tenant, job_id))


@router.post("/jobs/{job_id}/pause", operation_id="pause_fine_tuning_job")
async def pause_job(job_id: str, tenant: TenantDep, queue: QueueDep) -> FineTuningJob:
    """Pause a job. A running one keeps what it has learned."""
    return job_object(await queue.pause(tenant, job_id))


@router.post("/jobs/{job_id}/resume", operation_id="resume_fine_tuning_job")
async def resume_job(job_id: str, tenant: TenantDep, queue: QueueDep) -> FineTuningJob:
    """Queue a paused job again."""
    return job_object(await queue.resume(tenant, job_id))


@router.get(
    "/jobs/{job_id}/events",
    operation_id="list_fine_tuning_events",
    response_model=Page[JobEventObject],
    responses=IN_OPENAPI,
)
async def list_events(
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
        return await events_stream(services.queue, tenant, job_id, ping_interval_s=interval_s)
    return await events_page(services.queue, tenant, job_id, after, limit)


@router.get("/jobs/{job_id}/checkpoints", operation_id="list_fine_tuning_checkpoints")
async def list_checkpoints(
    job_id: str,
    tenant: TenantDep,
    queue: QueueDep,
    stores: StoresDep,
    after: AfterDep = None,
    limit: LimitDep = 20,
) -> Page[Checkpoint]:
    """The states of a job that can be asked as models: the published one, then the latest evaluated ones."""
    job = await queue.get(tenant, job_id)
    checkpoints = checkpoints_of(job, await stores.checkpoints.of_adapter(tenant, job.spec.adapter_id))
    first = 0
    if after is not None:
        ids = [checkpoint.id for checkpoint in checkpoints]
        if after not in ids:
            message = f"the job has no checkpoint {after!r}"
            raise NotFound(message, param="after", code="checkpoint_not_found")
        first = ids.index(after) + 1
    return page_of(checkpoints[first : first + limit], has_more=len(checkpoints) > first + limit)
