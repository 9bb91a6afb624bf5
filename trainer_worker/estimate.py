"""`python -m trainer_worker.estimate`: what a job would do, from its specification and its files alone.

The service runs this for a dry run, in a process of its own. It encodes the files, splits them and makes the
plan with the code that the worker uses, so it refuses what the worker would refuse; it loads the tokenizer
and no weights. Knows no Redis.

    input    one line of JSON (spec, created_at, sizes of the parts, basis), then the parts: the training
             file, the validation file, the preconditioner of the basis
    output   JSON: {"estimate": {…}} or {"error": {class, message, param, code, errors, num_problems}}
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import torch
from transformers import AutoConfig

from tessera.chat.chat_format import ChatFormat, load_chat_format
from tessera.errors import CorruptRecord, InvalidTrainingData, TesseraError
from tessera.formats.basis import Basis
from tessera.formats.manifest import BasisManifest
from tessera.methods.forms import find_preset
from tessera.model.base_model import longest_sequence
from tessera.processes.child_process import end_with_parent
from tessera.queue.preference import PreferenceOptions
from tessera.queue.records import JobSpec
from tessera.settings import CommonSettings
from trainer_worker.data.training_data import TrainingData, micro_batches
from trainer_worker.outcome.payloads import data_counts
from trainer_worker.preparing.classification import read_job_data
from trainer_worker.preparing.initialization import InitChoice
from trainer_worker.preparing.preparation import data_warnings, objective_of, read_files
from trainer_worker.settings import read_settings
from trainer_worker.training.learning_rates import BasisKind, LoraKind
from trainer_worker.training.lora.factors import LORA
from trainer_worker.training.plan import TrainingPlan, has_automatic_rate, make_plan
from trainer_worker.training.search.ladder import choose_ladder, idle_tokens
from trainer_worker.training.trainer import core_scale

#: More than the largest file takes: 170,000 examples are encoded in about a minute.
MAX_CPU_S = 300
MAX_MEMORY_BYTES = 6 * 1024**3
#: Steps whose padding is computed; that of further ones is taken to be the same.
PADDED_STEPS = 200


class HasRate(Protocol):
    """A kind of training with an automatic learning rate."""

    def rate_for(self, num_examples: int) -> float: ...


@dataclass(frozen=True)
class UnknownRate:
    """Stands for a basis that is not built yet, on which the automatic learning rate depends."""

    def rate_for(self, num_examples: int) -> float:
        return 1.0


def main() -> int:
    """Read one request, write the answer, and end."""
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    logging.disable(logging.WARNING)
    line, _, body = sys.stdin.buffer.read().partition(b"\n")
    try:
        answer: dict[str, Any] = {"estimate": estimate(json.loads(line), body)}
    except TesseraError as error:
        answer = {"error": error_as_json(error)}
    sys.stdout.write(json.dumps(answer))
    return 0


def estimate(head: dict[str, Any], body: bytes) -> dict[str, Any]:
    """Return the estimate. Raises `TesseraError` for everything that the worker would refuse."""
    settings, worker_settings = read_settings()
    spec = JobSpec.from_json(json.dumps(head["spec"]))
    parts, start = [], 0
    for size in head["sizes"]:
        parts.append(body[start : start + size])
        start += size
    training, validation, preconditioner = parts
    objective = objective_of(spec)
    source, revision = settings.base_model, settings.base_model_revision
    chat = load_chat_format(source, revision=revision, allow_control_tokens=settings.allow_control_tokens)
    data = job_data(
        chat.at(datetime.fromtimestamp(head["created_at"], UTC)),
        spec,
        training,
        validation if spec.validation_file is not None else None,
        limit=min(worker_settings.max_tokens, model_limit(settings)),
    )
    kind = kind_of(spec, head.get("basis"), preconditioner)
    plan = make_plan(
        spec.hyperparameters, spec.early_stopping, num_examples=data.num_train, kind=kind, seed=spec.seed
    )
    multiples = searched_multiples(spec, data, may_search=worker_settings.learning_rate_search)
    is_rate_known = not isinstance(kind, UnknownRate) and not multiples
    return {
        "hyperparameters": {
            **hyperparameters(plan, data, spec, is_rate_known=is_rate_known),
            **(asdict(objective) if isinstance(objective, PreferenceOptions) else {}),
        },
        "searched_multiples": multiples,
        "steps": plan.total_steps,
        "num_evaluations": 1 + -(-plan.total_steps // plan.evaluate_every),
        "data": {**data_counts(data), "truncated": data.num_truncated},
        "tokens": tokens(data, plan, worker_settings.token_budget, with_reference=objective.needs_reference),
        "warnings": [{"code": code, "message": message} for code, message in data_warnings(data)],
    }


def job_data(
    chat: ChatFormat, spec: JobSpec, training: bytes, validation: bytes | None, *, limit: int
) -> TrainingData:
    """Read and encode the files as `Preparation` does."""
    if spec.classification is not None:
        labelled = asyncio.run(read_job_data(chat, spec, training, validation, max_tokens=limit))
        return labelled.data
    return read_files(chat, spec, training, validation, max_tokens=limit)


def kind_of(spec: JobSpec, manifest: str | None, preconditioner: bytes) -> HasRate:
    """Return what the automatic learning rate depends on. manifest: of the stored basis, if there is one."""
    if spec.form == LORA:
        preset = find_preset(spec.method)
        preset.check_options(spec.basis_options)
        scale = spec.scaling.of(spec.rank) or preset.scale(spec.rank)
        return LoraKind(spec.method, spec.rank, scale, spec.objective)
    if manifest is None:
        return UnknownRate()
    found = BasisManifest.from_json(manifest)
    M, r = len(found.modules), found.rank
    if len(preconditioner) < 2 * M * r * r * 4:
        return UnknownRate()
    numbers = torch.frombuffer(bytearray(preconditioner), dtype=torch.float32)[: 2 * M * r * r]
    P_in, P_out = numbers.view(2, M, r, r)
    try:
        basis = Basis(found, (), (), P_in, P_out)
    except CorruptRecord:  # of a method that trains fewer numbers, whose vectors were not sent
        return UnknownRate()
    return BasisKind.of(
        basis,
        start=InitChoice.of(spec).method,
        scale=core_scale(basis, spec.scaling),
        objective=spec.objective,
    )


def searched_multiples(spec: JobSpec, data: TrainingData, *, may_search: bool) -> list[float]:
    """Return the multiples of the automatic learning rate that the job would try; none if it trains once.

    A worker with a GPU may judge them on folds of all examples instead of on those that are held back.
    """
    is_plain = spec.form != LORA and spec.classification is None and not objective_of(spec).is_preference
    if not (may_search and is_plain and has_automatic_rate(spec.hyperparameters)):
        return []
    ladder = choose_ladder(
        num_examples=data.num_train + (data.num_valid if data.groups else 0),
        num_groups=len(set(data.groups)),
        tokens_per_step=1,
        max_tokens=idle_tokens(is_gpu=False, num_parameters=0),
        has_held_out=bool(data.valid),
    )
    return [] if ladder is None else list(ladder.multiples)


def hyperparameters(
    plan: TrainingPlan, data: TrainingData, spec: JobSpec, *, is_rate_known: bool
) -> dict[str, Any]:
    """Return the plan by the names of the request; a learning rate that is not known yet stays "auto"."""
    given = {name: value for name, value in spec.hyperparameters.items() if value != "auto"}
    chosen: dict[str, Any] = {
        "n_epochs": plan.num_epochs,
        "batch_size": plan.batch_size // plan.gradient_accumulation_steps,
        "learning_rate": plan.learning_rate if is_rate_known else "auto",
        "lr_scheduler_type": plan.schedule,
        "warmup_ratio": round(plan.warmup_steps / plan.total_steps, 6),
        "weight_decay": plan.weight_decay,
        "max_length": data.max_tokens,
    }
    return {**chosen, **given}


def tokens(
    data: TrainingData, plan: TrainingPlan, token_budget: int, *, with_reference: bool = False
) -> dict[str, int]:
    """Count the tokens of the whole job, as if it trained alone and to its last step.

    with_reference: all pairs are also evaluated once before the first step.
    """
    lengths = [[len(row.token_ids) for row in rows] for rows in data.train_examples]
    steps = min(plan.total_steps, PADDED_STEPS)
    plain = padding = 0
    for step in range(steps):
        indices = data.batch_indices(step, batch_size=plan.batch_size, seed=plan.seed)
        rows = [(0, row) for index in indices for row in data.train_examples[index]]
        sizes = [len(data.train_examples[index]) for index in indices] if data.train_chosen else None
        for batch in micro_batches(rows, sizes=sizes, token_budget=token_budget):
            plain += batch.num_tokens
            padding += batch.num_padding
    per_epoch = sum(map(sum, lengths))
    trained = per_epoch * plan.num_epochs
    evaluations = 1 + -(-plan.total_steps // plan.evaluate_every)
    held_out = sum(len(row.token_ids) for row in data.valid)
    return {
        "per_epoch": per_epoch,
        "trained": trained,
        "padding": round(padding / plain * trained) if plain else 0,
        "evaluated": evaluations * held_out + (per_epoch + held_out if with_reference else 0),
    }


def model_limit(settings: CommonSettings) -> int:
    """Return the longest sequence of the base model, from its configuration alone."""
    config = AutoConfig.from_pretrained(settings.base_model, revision=settings.base_model_revision)
    return longest_sequence(config, settings.max_model_len)


def error_as_json(error: TesseraError) -> dict[str, Any]:
    """Return the error in a form that the service can raise again."""
    fields: dict[str, Any] = {
        "class": type(error).__name__, "message": error.message, "param": error.param, "code": error.code,
    }  # fmt: skip
    if isinstance(error, InvalidTrainingData):
        fields |= {
            "errors": [asdict(problem) for problem in error.errors],
            "num_problems": error.num_problems,
        }
    return fields


if __name__ == "__main__":
    sys.exit(main())
