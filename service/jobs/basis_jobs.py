"""Turn a request to build a basis into a job in the queue. Knows no HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.jobs.basis_choices import BasisChoices
from service.jobs.recipes import RecipeRequest
from service.jobs.training_jobs import BUILD_COST_TOKENS, BYTES_PER_TOKEN
from tessera.queue.client import Job, JobQueue, JobSpec


@dataclass(frozen=True)
class BasisRequest:
    """A request to build a basis, which is kept until it is deleted."""

    recipe: RecipeRequest
    #: None: the default.
    rank: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)


class BasisJobs:
    """Submits the basis jobs of all tenants. They wait in the same queue as training jobs."""

    def __init__(self, queue: JobQueue, choices: BasisChoices, *, base_model: str) -> None:
        self._queue = queue
        self._choices = choices
        self._base_model = base_model

    async def submit(self, tenant: str, request: BasisRequest, *, dedupe_key: str) -> Job:
        """Queue the job, once per dedupe_key. Raises `InvalidInput`, `NotFound`, `QuotaExceeded`."""
        choice = await self._choices.recipe(tenant, request.recipe, rank=request.rank)
        spec = JobSpec(
            kind="basis", base_model=self._base_model, metadata=request.metadata, **choice.spec_fields
        )
        cost = BUILD_COST_TOKENS + choice.calibration_bytes // BYTES_PER_TOKEN
        return await self._queue.submit(tenant, spec, cost=cost, dedupe_key=dedupe_key)
