"""Dry runs: check a job as a submission would, and estimate its steps, tokens, time and cost.

The files are encoded by the trainer's own code, in a process that lives for one estimate
(`python -m trainer_worker.estimate`), so this process loads no torch. Times come from what the workers have
measured about themselves. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from service.jobs.training_jobs import JobRequest, PlannedJob, TrainingJobs
from service.processes.fair_gate import FairGate
from tessera import errors
from tessera.errors import InvalidTrainingData, LineError, NotFound, RequestFailed, TesseraError
from tessera.queue.client import Job, JobQueue, JobStatus
from tessera.queue.worker_reports import WorkerReport, WorkerReports
from tessera.store.files import FileStore
from tessera.store.manifests import BasisManifests

logger = logging.getLogger(__name__)

#: An estimate that takes longer is given up.
MAX_ESTIMATE_S = 300.0
_COMMAND = (sys.executable, "-m", "trainer_worker.estimate")


class JobEstimates:
    """Estimates jobs before they are submitted, and when queued ones will end."""

    def __init__(
        self,
        jobs: TrainingJobs,
        queue: JobQueue,
        reports: WorkerReports,
        files: FileStore,
        bases: BasisManifests,
    ) -> None:
        self._jobs, self._queue, self._reports = jobs, queue, reports
        self._files, self._bases = files, bases
        #: Two at a time, of different tenants: each takes 0.4 GB for torch, beside the encoded examples.
        self._gate = FairGate(capacity=2, share=1)

    async def estimate(self, tenant: str, request: JobRequest) -> dict[str, Any]:
        """Return the estimate of a job, which is not queued.

        Raises everything that `TrainingJobs.submit` raises, and what a worker would say of the files:
        `InvalidTrainingData`, `InvalidInput`.
        """
        planned = await self._jobs.plan(tenant, request)
        async with self._gate.room(tenant):
            found = await self._ask(tenant, planned)
        counts = found["tokens"]
        reports = await self._reports.read()
        training_s = expected_seconds(
            reports,
            steps=found["steps"],
            train_tokens=counts["trained"],
            eval_tokens=counts["evaluated"],
        )
        wait_s = await self._wait_s(reports)
        return {
            **found,
            "cost_tokens": planned.cost,
            "quota_bytes": planned.quota_bytes,
            "wait_s": _rounded(wait_s),
            "run_s": _rounded(training_s),
            "estimated_finish": _finish(time.time(), wait_s, training_s),
        }

    async def finish_of(self, job: Job) -> int | None:
        """Return when a queued job will have ended, as Unix seconds; None while nobody can know."""
        if job.status is not JobStatus.QUEUED:
            return None
        reports = await self._reports.read()
        measured = expected_seconds(reports, steps=0, train_tokens=job.cost, eval_tokens=0)
        return _finish(time.time(), await self._wait_s(reports), measured)

    async def _wait_s(self, reports: Sequence[WorkerReport]) -> float | None:
        """Return how long a job that is queued now waits for a worker; None if no worker is there.

        With a free place it does not wait. Otherwise all queued tokens come first, at the speed of all
        workers together: more than the turns between tenants may ask for, and never less.
        """
        alive = [report for report in reports if report.is_alive]
        stats = await self._queue.stats()
        num_waiting = stats.jobs[JobStatus.QUEUED] - stats.delayed
        if sum(report.free_slots for report in alive) > num_waiting:
            return 0.0
        speeds = [1 / report.token_s for report in alive if report.token_s]
        return stats.backlog_cost / sum(speeds) if speeds else None

    async def _ask(self, tenant: str, planned: PlannedJob) -> dict[str, Any]:
        """Return what the trainer's code says of the job."""
        spec = planned.spec
        training = await self._files.content(tenant, spec.training_file)
        validation = b""
        if spec.validation_file is not None:
            validation = await self._files.content(tenant, spec.validation_file)
        manifest, preconditioner = await self._stored_basis(planned)
        head = {
            "spec": json.loads(spec.to_json()),
            "created_at": time.time(),
            "sizes": [len(training), len(validation), len(preconditioner)],
            "basis": manifest,
        }
        content = json.dumps(head).encode() + b"\n" + training + validation + preconditioner
        found = await _run(content)
        if "error" in found:
            raise read_error(found["error"])
        estimate: dict[str, Any] = found["estimate"]
        return estimate

    async def _stored_basis(self, planned: PlannedJob) -> tuple[str | None, bytes]:
        """Return manifest and preconditioner of the job's basis, if it is stored already."""
        spec = planned.spec
        basis_id = spec.basis_id
        if basis_id is None and planned.is_shared:
            shared = [m for m in await self._bases.list() if (m.method, m.rank) == (spec.method, spec.rank)]
            plain = [m.basis_id for m in shared if not m.recipe.get("calibration")]
            basis_id = plain[0] if len(plain) == 1 else None
        if basis_id is None:
            return None, b""
        try:
            manifest = await self._bases.manifest(basis_id)
        except NotFound:
            return None, b""
        return manifest.to_json(), await self._bases.preconditioner(basis_id)


def expected_seconds(
    reports: Sequence[WorkerReport], *, steps: int, train_tokens: int, eval_tokens: int
) -> float | None:
    """Return how long a job of this size takes in a worker, in the median of those that have measured."""
    found = []
    for report in [report for report in reports if report.is_alive] or reports:
        training_s = report.training_seconds(steps=steps, train_tokens=train_tokens, eval_tokens=eval_tokens)
        if training_s is not None:
            found.append(training_s * report.load + (report.fixed_s or 0.0))
    return median(found) if found else None


async def _run(content: bytes) -> dict[str, Any]:
    """Run the process with this input and return its answer. Raises `RequestFailed`."""
    process = await asyncio.create_subprocess_exec(
        *_COMMAND, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(MAX_ESTIMATE_S):
            output, _ = await process.communicate(content)
        found: dict[str, Any] = json.loads(output)
        return found
    except (TimeoutError, ValueError, OSError) as error:
        logger.error("an estimate failed: status %s, %r", process.returncode, error)
        raise RequestFailed("the estimate took too much time or memory; its log has the reason") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def read_error(fields: dict[str, Any]) -> TesseraError:
    if "errors" in fields:
        problems = [LineError(**problem) for problem in fields["errors"]]
        return InvalidTrainingData(
            problems, param=fields["param"], code=fields["code"], num_problems=fields["num_problems"]
        )
    kind: type[TesseraError] = getattr(errors, fields["class"], RequestFailed)
    return kind(fields["message"], param=fields["param"], code=fields["code"])


def _finish(now: float, wait_s: float | None, run_s: float | None) -> int | None:
    return None if wait_s is None or run_s is None else round(now + wait_s + run_s)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
