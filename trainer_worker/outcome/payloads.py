"""The content of what is written about a job: sentences and JSON for events, progress, results and errors.

The names in metrics events are OpenAI's where OpenAI has one.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from tessera.errors import TesseraError
from tessera.queue.hyperparameters import SGD
from tessera.queue.preference import PreferenceOptions
from tessera.queue.records import Job
from tessera.store.adapters import AdapterVersion
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.run import RunUpdate, TrainRun

#: A job that still has to publish its result is not done.
MAX_UNFINISHED_PERCENT = 99.0

_ADVICE = (
    "try more examples, examples whose answers have more in common, a larger rank or another basis; "
    "a fixed learning_rate is worth a try only after that"
)


def start_message(run: TrainRun) -> str:
    """Return a sentence about the size of the training, or about where it continues."""
    plan, data = run.plan, run.data
    if run.progress.step:
        return f"Training continues at step {run.progress.step} of {plan.total_steps}"
    what = "pairs" if run.objective.is_preference else "examples"
    return (
        f"Training begins: {data.num_train} {what}, {data.num_valid} held back for validation, "
        f"{plan.num_epochs} epoch(s), {plan.total_steps} steps of {plan.batch_size}, "
        f"learning rate {plan.learning_rate:g}"
    )


def metrics_message(update: RunUpdate) -> str:
    """Return the sentence of a metrics event."""
    if update.reference_progress is not None:
        done, total = update.reference_progress
        return f"Reference log-probabilities of {done} of {total} pairs"
    losses = [
        f"{name} loss {loss:.4f}"
        for name, loss in (("training", update.train_loss), ("validation", update.valid_loss))
        if loss is not None
    ]
    return f"Step {update.step}/{update.total_steps}: {', '.join(losses) or 'skipped'}"


def metrics_data(update: RunUpdate) -> dict[str, Any]:
    """Return the data of a metrics event, without values that were not measured."""
    values = {
        "step": update.step,
        "total_steps": update.total_steps,
        "train_loss": update.train_loss,
        "valid_loss": update.valid_loss,
        **update.details,
        "learning_rate": update.learning_rate or None,
        "trained_tokens": update.trained_tokens,
    }
    return {name: value for name, value in values.items() if value is not None}


def log_message(run: TrainRun, update: RunUpdate, remaining_s: float | None) -> str:
    """Return the sentence of the worker's log about a run under way."""
    percent = 100 * update.step / max(1, update.total_steps)
    left = "" if remaining_s is None else f", about {remaining_s:.0f} s left"
    return f"job {run.run_id}: {metrics_message(update)} ({percent:.0f} %{left})"


def log_data(run: TrainRun, update: RunUpdate, remaining_s: float | None) -> dict[str, Any]:
    """Return the fields of a JSON line of the worker's log about a run under way."""
    progress = training_progress(run, update, remaining_s)
    names = ("step", "total_steps", "percent", "train_loss", "valid_loss", "remaining_s")
    values = {name: progress[name] for name in names}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def chosen_hyperparameters(run: TrainRun) -> dict[str, Any]:
    """Return what the run trains with, by the names of the request: numbers in place of "auto"."""
    plan = run.published_plan
    chosen = {
        "n_epochs": plan.num_epochs,
        "batch_size": plan.batch_size // plan.gradient_accumulation_steps,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": plan.schedule,
        "min_lr_ratio": plan.final_share,
        "warmup_ratio": round(plan.warmup_steps / plan.total_steps, 6),
        "warmup_steps": plan.warmup_steps,
        "weight_decay": plan.weight_decay,
        "optimizer": plan.optimizer,
        "max_grad_norm": plan.max_grad_norm or 0.0,
        "publish": plan.publish,
    }
    own = ("momentum",) if plan.optimizer == SGD else ("adam_beta1", "adam_beta2", "adam_epsilon")
    chosen |= {name: getattr(plan, name) for name in own}
    if isinstance(run.objective, PreferenceOptions):
        chosen |= asdict(run.objective)
    if run.data.max_tokens is not None:
        chosen["max_length"] = run.data.max_tokens
    if plan.automatic_rate:
        chosen["learning_rate_multiplier"] = float(f"{plan.learning_rate / plan.automatic_rate:.6g}")
    return chosen


def building_progress(done: int, total: int) -> dict[str, Any]:
    """Return the job's progress while its basis is built or its initialization is computed."""
    return {"phase": "preparing", "modules_done": done, "modules": total}


def training_progress(run: TrainRun, update: RunUpdate, remaining_s: float | None) -> dict[str, Any]:
    """Return the job's progress at the time of an update.

    remaining_s: seconds until the job has ended; None if nobody knows. The percentage is that of the planned
    steps; it is 100 only when the job has ended (`final_progress`).
    """
    progress, plan = run.progress, run.plan
    steps_per_epoch = max(1, plan.total_steps // plan.num_epochs)
    percent = min(round(100 * update.step / plan.total_steps, 1), MAX_UNFINISHED_PERCENT)
    return {
        "phase": _phase(update),
        "step": update.step,
        "total_steps": plan.total_steps,
        "epoch": min(plan.num_epochs, update.step // steps_per_epoch + 1),
        "num_epochs": plan.num_epochs,
        "percent": percent,
        "remaining_s": None if remaining_s is None else round(remaining_s, 2),
        "trained_tokens": update.trained_tokens,
        "learning_rate": run.learning_rate,
        "train_loss": progress.train_loss,
        "valid_loss": progress.valid_loss,
        "initial_valid_loss": progress.initial_valid_loss,
        "best_valid_loss": progress.best_valid_loss,
        "best_step": progress.best_step,
        "hyperparameters": chosen_hyperparameters(run),
    }


def _phase(update: RunUpdate) -> str:
    if update.reference_progress is not None:
        return "reference"
    return "training" if update.finish_reason is None else "publishing"


def final_progress(run: TrainRun) -> dict[str, Any]:
    """Return the progress of a job that has published its result, also if it ended before its last step."""
    progress = training_progress(run, run.update(), 0.0)
    return {**progress, "phase": "finished", "percent": 100.0}


def result_warnings(run: TrainRun) -> list[tuple[str, str]]:
    """Return warnings about the result for the job's owner, as (code, sentence)."""
    progress = run.progress
    published, base = run.published_valid_loss, progress.base_valid_loss
    losses = [loss for loss in (progress.initial_valid_loss, base) if loss is not None]
    if published is None or not losses or published < min(losses):
        return []
    message = (
        f"training found nothing better than it began with: the validation loss is {min(losses):.4f} without "
        f"training and {published:.4f} as published; {_ADVICE}"
    )
    return [("no_improvement", message)]


def adapter_metadata(run: TrainRun, job: Job) -> dict[str, Any]:
    """Return the provenance that is stored with the adapter."""
    progress = run.progress
    return {
        "job_id": job.job_id,
        "base_model": job.spec.base_model,
        **run.provenance,
        "start": None if run.init_notes is None else run.init_notes.get("method"),
        "seed": job.spec.seed,
        "objective": job.spec.objective,
        "training_file": job.spec.training_file,
        "data_digest": run.data.digest,
        "warm_start_from": job.spec.warm_start_from,
        "step": run.published_step,
        "initial_valid_loss": progress.initial_valid_loss,
        "valid_loss": run.published_valid_loss,
        "metadata": job.spec.metadata,
    }


def checkpoint_metadata(run: TrainRun, job: Job, step: int) -> dict[str, Any]:
    """Return what is stored with an intermediate state: its provenance and its metrics by OpenAI's names."""
    row = run.history.at(step)
    return {
        **run.provenance,
        "base_model": job.spec.base_model,
        "step": step,
        "train_loss": row.train_loss,
        "train_mean_token_accuracy": row.train_accuracy,
        "valid_loss": row.valid_loss,
        "valid_mean_token_accuracy": row.valid_accuracy,
    }


def error_payload(error: Exception) -> dict[str, Any]:
    """Why a job failed, for its owner."""
    if isinstance(error, TesseraError):
        return {"code": error.code, "message": error.message, "param": error.param}
    return {"code": "internal_error", "message": f"{type(error).__name__}: {error}", "param": None}


def data_counts(data: TrainingData) -> dict[str, Any]:
    """Return the counts over the examples that a report shows."""
    counts = {} if data.statistics is None else asdict(data.statistics)
    rows = [*data.train, *data.valid]
    return {
        **counts,
        "num_train": data.num_train,
        "num_validation": data.num_valid,
        "train_tokens": data.num_train_tokens,
        "longest_tokens": max(len(row.token_ids) for row in rows),
    }


def training_result(
    run: TrainRun, version: AdapterVersion, job: Job, *, training_s: float, warnings: list[tuple[str, str]]
) -> dict[str, Any]:
    """Return the result of a job that has published a version."""
    progress, plan, data = run.progress, run.published_plan, run.data
    return {
        "adapter": {"id": job.spec.adapter_id, "version": version.version},
        "version": version.version,
        "adapter_bytes": version.bytes,
        "basis_id": version.basis_id,
        "start": run.init_notes,
        "steps": progress.step,
        "epochs": round(progress.step * plan.num_epochs / plan.total_steps, 2),
        "finish_reason": progress.finish_reason,
        "trained_tokens": progress.trained_tokens,
        "initial_valid_loss": progress.initial_valid_loss,
        "base_valid_loss": progress.base_valid_loss,
        "best_valid_loss": progress.best_valid_loss,
        "best_step": progress.best_step,
        "search": run.search_report,
        "published": plan.publish,
        "published_step": run.published_step,
        "published_valid_loss": run.published_valid_loss,
        "published_valid_accuracy": run.published_valid_accuracy,
        "final_train_loss": progress.train_loss,
        "learning_rate": plan.learning_rate,
        "batch_size": plan.batch_size,
        "num_examples": data.num_train + data.num_valid,
        "num_validation": data.num_valid,
        "truncated": data.num_truncated,
        "data": data_counts(data),
        "training_s": round(training_s, 2),
        "warnings": [{"code": code, "message": message} for code, message in warnings],
    }
