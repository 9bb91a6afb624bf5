"""A job's events, whatever kind of job it is: a page of them, or all of them as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from service.http.event_stream import DONE, EventStream, event
from service.http.routes.job_shapes import event_object
from service.http.schemas.common import Page, page_of
from service.http.schemas.training import JobEventObject
from tessera.queue.client import JobEvent, JobQueue

#: Seconds between two reads of new events.
FOLLOW_INTERVAL_S = 0.5
#: Events are read in pages of this many.
_PAGE_SIZE = 100


async def events_page(
    queue: JobQueue, tenant: str, job_id: str, after: str | None, limit: int
) -> Page[JobEventObject]:
    """Return one page of a job's events, newest first. Raises `NotFound`."""
    events, has_more = await queue.events(tenant, job_id, after, limit)
    return page_of([event_object(found) for found in events], has_more)


async def events_stream(queue: JobQueue, tenant: str, job_id: str, *, ping_interval_s: float) -> EventStream:
    """Stream a job's events, oldest first, until the job has ended. Raises `NotFound`."""
    return await EventStream(_follow(queue, tenant, job_id), ping_interval_s=ping_interval_s).begin()


async def _follow(queue: JobQueue, tenant: str, job_id: str) -> AsyncGenerator[str, None]:
    newest: str | None = None
    while True:
        job = await queue.get(tenant, job_id)  # before the events, so that the job's last one is not missed
        for found in await _events_since(queue, tenant, job_id, newest):
            newest = found.event_id
            yield event(event_object(found).model_dump())
        if job.status.is_final:
            break
        await asyncio.sleep(FOLLOW_INTERVAL_S)
    yield DONE


async def _events_since(queue: JobQueue, tenant: str, job_id: str, newest: str | None) -> list[JobEvent]:
    """Return the events after `newest`, oldest first."""
    found: list[JobEvent] = []
    has_more, after = True, None
    while has_more:
        page, has_more = await queue.events(tenant, job_id, after, _PAGE_SIZE)
        for job_event in page:
            if job_event.event_id == newest:
                return found[::-1]
            found.append(job_event)
        after = page[-1].event_id if page else None
    return found[::-1]
