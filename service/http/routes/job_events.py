"""A job's events as server-sent events, whatever kind of job it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from service.http.event_stream import DONE, event
from service.http.routes.job_shapes import event_object
from service.jobs.job_events import follow
from tessera.queue.client import JobQueue

#: How often a stream of events looks for new ones.
FOLLOW_INTERVAL_S = 0.5


async def follow_events(queue: JobQueue, tenant: str, job_id: str) -> AsyncGenerator[str, None]:
    """Oldest first, until the job has ended. Raises `NotFound` before the first."""
    async with aclosing(follow(queue, tenant, job_id)) as looks:
        async for events, has_ended in looks:
            for found in events:
                yield event(event_object(found).model_dump())
            if has_ended:
                break
            await asyncio.sleep(FOLLOW_INTERVAL_S)
    yield DONE
