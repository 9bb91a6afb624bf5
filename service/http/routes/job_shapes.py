"""Translate training jobs between OpenAI's shape and Tessera's own."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from service.http.schemas.training import (
    BasisRecipe,
    Checkpoint,
    CheckpointMetrics,
    Classification,
    FineTuningJob,
    FineTuningJobRequest,
    JobClassification,
    JobClassificationMethod,
    JobDpo,
    JobDpoHyperparameters,
    JobDpoMethod,
    JobError,
    JobEstimate,
    JobEventObject,
    JobHyperparameters,
    JobMethod,
    JobSupervised,
    StartRecipe,
    TrainedAdapter,
)
from service.jobs.recipes import InitRequest, RecipeRequest
from service.jobs.training_jobs import JobRequest
from tessera.formats.adapter_ref import checkpoint_step, version_name
from tessera.queue.client import Job, JobEvent, JobSpec, JobStatus
from tessera.queue.hyperparameters import HYPERPARAMETERS
from tessera.queue.preference import DPO, PreferenceOptions
from tessera.store.adapters import AdapterVersion

_LEVELS = get_args(JobEventObject.model_fields["level"].annotation)
_TYPES = get_args(JobEventObject.model_fields["type"].annotation)


def job_request(body: FineTuningJobRequest) -> JobRequest:
    """Turn the body of a request to train into the request that `TrainingJobs.submit` takes."""
    return JobRequest(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=body.seed,
        adapter_id=body.adapter.id,
        rank=body.adapter.rank,
        method=body.adapter.method,
        basis=basis_request(body.adapter.basis),
        init=init_request(body.adapter.init),
        form=body.adapter.form,
        rank_pattern=body.adapter.rank_pattern or None,
        target_modules=body.adapter.module_patterns,
        scaling=body.adapter.scaling,
        hyperparameters=body.chosen_hyperparameters(),
        early_stopping=None if body.early_stopping is None else body.early_stopping.model_dump(),
        metadata=body.metadata or {},
        classification=_classification(body),
        objective=body.objective,
        objective_options=body.objective_options(),
    )


def _classification(body: FineTuningJobRequest) -> dict[str, Any] | None:
    """Return the options of a job that trains a classifier; None for any other job."""
    if body.method is None or body.method.type != "classification":
        return None
    options = body.method.classification or Classification()
    return options.model_dump(exclude={"hyperparameters"})


def basis_request(basis: str | BasisRecipe | None) -> str | RecipeRequest | None:
    if not isinstance(basis, BasisRecipe):
        return basis
    return RecipeRequest(basis.method, dict(basis.options), basis.calibration)


def init_request(init: str | StartRecipe | None) -> InitRequest | None:
    if isinstance(init, StartRecipe):
        return InitRequest(init.method, dict(init.options))
    return None if init is None else InitRequest(init)


def estimate_object(found: dict[str, Any]) -> JobEstimate:
    """Return an estimate as callers see it. found: what `JobEstimates.estimate` has returned."""
    hyperparameters = {name: found["hyperparameters"].get(name, "auto") for name in HYPERPARAMETERS}
    return JobEstimate(**{**found, "hyperparameters": JobHyperparameters(**hyperparameters)})


def job_object(job: Job, *, queued_finish: int | None = None) -> FineTuningJob:
    """Return a job in OpenAI's shape, with our further fields.

    queued_finish: when the job will have ended if it is still queued, as Unix seconds; None: unknown.
    """
    spec, result = job.spec, job.result or {}
    has_succeeded = job.status == JobStatus.SUCCEEDED
    progress = dict(job.progress)
    chosen = progress.pop("hyperparameters", {})  # known once training has begun
    numbers = {name: spec.hyperparameters.get(name, chosen.get(name, "auto")) for name in HYPERPARAMETERS}
    hyperparameters = JobHyperparameters(**numbers)
    return FineTuningJob(
        id=job.job_id,
        created_at=int(job.created_at),
        finished_at=seconds(job.finished_at),
        estimated_finish=queued_finish if job.status == JobStatus.QUEUED else _estimated_finish(job),
        fine_tuned_model=spec.adapter_id if has_succeeded else None,
        hyperparameters=hyperparameters,
        model=spec.warm_start_from or spec.base_model,
        organization_id=job.tenant,
        seed=spec.seed,
        status=job.status.value,
        trained_tokens=result.get("trained_tokens"),
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        error=job_error(job.error),
        metadata=spec.metadata,
        method=_method(spec, hyperparameters),
        user_provided_suffix=spec.suffix,
        adapter=_adapter(job, result),
        progress=progress,
        result=job.result,
        result_files=result.get("result_files", []),
        early_stopping=spec.early_stopping,
        started_at=seconds(job.started_at),
        attempt=job.attempt,
        queue_position=job.queue_position,
    )


def _method(
    spec: JobSpec, hyperparameters: JobHyperparameters
) -> JobMethod | JobDpoMethod | JobClassificationMethod:
    if spec.classification is not None:
        options = Classification(**spec.classification).model_dump(exclude={"hyperparameters"})
        chosen = JobClassification(hyperparameters=hyperparameters, **options)
        return JobClassificationMethod(classification=chosen)
    if spec.objective == DPO:
        preference = asdict(PreferenceOptions.of(spec.objective_options))
        both = JobDpoHyperparameters(**hyperparameters.model_dump(), **preference)
        return JobDpoMethod(dpo=JobDpo(hyperparameters=both))
    return JobMethod(supervised=JobSupervised(hyperparameters=hyperparameters))


def event_object(event: JobEvent) -> JobEventObject:
    """Return an event in OpenAI's shape. A level or type that only a newer release knows
    is reported as "info" or "message"."""
    return JobEventObject.model_validate(
        {
            "id": event.event_id,
            "created_at": int(event.created_at),
            "level": event.level if event.level in _LEVELS else "info",
            "type": event.type if event.type in _TYPES else "message",
            "message": event.message,
            "data": event.data,
        }
    )


def checkpoints_of(job: Job, states: Sequence[AdapterVersion]) -> list[Checkpoint]:
    """Return the states of a job that can be asked: the published one, then `states`, latest first.

    states: the intermediate states of the job's adapter, of which those of other jobs are left out.
    """
    found, result = [], job.result or {}
    if job.status == JobStatus.SUCCEEDED and "version" in result:
        metrics = {
            "step": result.get("published_step", result.get("best_step", 0)),
            "valid_loss": result.get("published_valid_loss", result.get("best_valid_loss")),
            "valid_mean_token_accuracy": result.get("published_valid_accuracy"),
        }
        finished_at = job.finished_at or job.created_at
        found.append(_checkpoint(job, result["version"], finished_at, metrics, suffix=""))
    for state in states:
        step = checkpoint_step(state.version)
        if state.job_id == job.job_id and step is not None:
            metrics = {**state.metadata, "step": step}
            found.append(_checkpoint(job, state.version, state.created_at, metrics, suffix=f"-{step}"))
    return found


def _checkpoint(
    job: Job, version: int, created_at: float, metrics: Mapping[str, Any], *, suffix: str
) -> Checkpoint:
    names = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    measured = {name: metrics.get(name) for name in names}
    return Checkpoint(
        id=f"ftckpt_{job.job_id.removeprefix('ftjob-')}{suffix}",
        created_at=int(created_at),
        fine_tuned_model_checkpoint=version_name(job.spec.adapter_id, version),
        fine_tuning_job_id=job.job_id,
        step_number=metrics["step"],
        metrics=CheckpointMetrics(
            step=metrics["step"],
            **measured,
            full_valid_loss=measured["valid_loss"],
            full_valid_mean_token_accuracy=measured["valid_mean_token_accuracy"],
        ),
    )


def _estimated_finish(job: Job) -> int | None:
    """Return the end of a running job as its worker has estimated it; None while nobody knows."""
    remaining_s = job.progress.get("remaining_s")
    if job.status != JobStatus.RUNNING or job.progress_at is None or remaining_s is None:
        return None
    return math.ceil(max(job.progress_at + float(remaining_s), time.time()))


def _adapter(job: Job, result: dict[str, Any]) -> TrainedAdapter:
    spec = job.spec
    return TrainedAdapter(
        id=spec.adapter_id,
        version=result.get("version"),
        form=spec.form,
        method=spec.method,
        rank=spec.rank,
        rank_pattern=spec.rank_pattern,
        target_modules=spec.target_modules,
        alpha=spec.alpha,
        use_rslora=spec.use_rslora,
        scale=spec.scale,
        basis=result.get("basis_id", spec.basis_id),
        calibration=spec.calibration,
        init=_init_name(spec),
    )


def _init_name(spec: JobSpec) -> str:
    """Return the name of the job's init."""
    if spec.form != "core":
        return spec.method
    if spec.start is not None:
        return str(spec.start["method"])
    return "zero" if spec.warm_start_from is None else "warm"


def job_error(error: dict[str, Any] | None) -> JobError | None:
    """Return the error of a failed job in OpenAI's shape; None for any other job."""
    if error is None:
        return None
    code, message = str(error.get("code", "internal_error")), str(error.get("message", ""))
    return JobError(code=code, message=message, param=error.get("param"))


def seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
