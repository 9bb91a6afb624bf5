"""A job's events as they come, for whoever follows it."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from tessera.queue.client import JobEvent, JobQueue

#: Events are read in pages of this many.
_EVENTS_PAGE = 100


async def follow(
    queue: JobQueue, tenant: str, job_id: str
) -> AsyncGenerator[tuple[list[JobEvent], bool], None]:
    """Endlessly: the events, oldest first, that came since the last look, and whether the job has ended.

    Whoever reads decides when to look again. Raises `NotFound`.
    """
    newest: str | None = None
    while True:
        job = await queue.get(tenant, job_id)  # before the events: its last one must not be missed
        events = await _events_since(queue, tenant, job_id, newest)
        newest = events[-1].event_id if events else newest
        yield events, job.status.is_final


async def _events_since(queue: JobQueue, tenant: str, job_id: str, newest: str | None) -> list[JobEvent]:
    found: list[JobEvent] = []
    has_more, after = True, None
    while has_more:
        page, has_more = await queue.events(tenant, job_id, after, _EVENTS_PAGE)
        for event in page:
            if event.event_id == newest:
                return found[::-1]
            found.append(event)
        after = page[-1].event_id if page else None
    return found[::-1]
