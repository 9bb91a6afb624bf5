"""From a claimed job to a run that can be trained: files, examples, basis, plan, initialization.

Also prepares the basis of a job that only builds one.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.data.examples import MAX_EXAMPLES, ExampleFile
from tessera.data.labels import is_labelled
from tessera.data.pairs import parse_pairs
from tessera.data.statistics import statistics_of, statistics_of_pairs
from tessera.errors import InvalidInput, InvalidTrainingData, NotFound
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import parse_version_name
from tessera.formats.basis import Basis
from tessera.methods.bases import CalibrationSet, Population
from tessera.methods.init import Initialization, compute_init
from tessera.methods.init.method import InitInputs
from tessera.model.base_model import BaseModel
from tessera.queue.hyperparameters import check_together
from tessera.queue.preference import DPO, OBJECTIVES
from tessera.queue.records import OWN_DATA, Job, JobSpec
from tessera.store.adapters import AdapterStore
from tessera.store.files import FileStore
from trainer_worker.common.model_lock import ModelLock, Progress
from trainer_worker.data.pairs import encode_pairs
from trainer_worker.data.training_data import TrainingData, encode_data
from trainer_worker.preparing.basis_source import Attempt, BasisSource, Calibration, JobBasis
from trainer_worker.preparing.classification import ClassificationPreparation, read_job_data
from trainer_worker.preparing.initialization import BASE_MODEL, InitChoice, init_message
from trainer_worker.preparing.lora import LoraPreparation, form_message
from trainer_worker.preparing.runs import plan_run
from trainer_worker.training import checkpoint
from trainer_worker.training.lora.factors import LORA
from trainer_worker.training.objectives.objective import SUPERVISED, Objective
from trainer_worker.training.objectives.preference import Preference
from trainer_worker.training.plan import TrainingPlan, max_example_tokens, validation_share
from trainer_worker.training.run import TrainRun

#: Share of examples equal or nearly equal to others from which their owner is warned.
MANY_DUPLICATES = 0.2


@dataclass(frozen=True)
class Prepared:
    """A run that may join its trainer."""

    run: TrainRun
    #: Messages on the preparation for the job's owner: a sentence and the data of its event.
    messages: list[tuple[str, dict[str, Any] | None]]
    #: Whether the initialization took passes through the model, so that its result is worth a checkpoint.
    is_init_costly: bool = False
    #: Warnings for the job's owner, as (code, sentence).
    warnings: list[tuple[str, str]] = field(default_factory=list)


class Preparation:
    """Prepares jobs, with the base model, its chat format and the stores."""

    def __init__(
        self,
        base: BaseModel,
        chat: ChatFormat,
        *,
        files: FileStore,
        adapters: AdapterStore,
        bases: BasisSource,
        lora: LoraPreparation,
        classification: ClassificationPreparation,
        model_lock: ModelLock,
        max_tokens: int,
        max_examples: int,
        may_search: bool,
    ) -> None:
        """may_search: whether jobs may search for their learning rate."""
        self._max_examples = max_examples
        self._base, self._chat = base, chat
        self._may_search = may_search
        self._files, self._adapters, self._bases, self._model_lock = files, adapters, bases, model_lock
        self._lora, self._classification = lora, classification
        self._max_tokens = min(max_tokens, base.max_position)

    async def prepare(self, attempt: Attempt, saved: bytes | None) -> Prepared:
        """Return the run, in the state of the checkpoint `saved` if it fits.

        Raises `InvalidInput`, `InvalidTrainingData`, `NotFound`, `Conflict` for what the job's owner must
        correct, `Unavailable` for what another attempt may solve, `TesseraError` (out_of_memory).
        """
        job, spec = attempt.job, attempt.job.spec
        self._check_model(spec)
        objective = objective_of(spec)
        training = await self._content(job.tenant, spec.training_file, "training_file")
        if spec.classification is not None:
            return await self._classifier(attempt, training, saved)
        if self._base.encoder is not None:
            message = 'the base model is an encoder; train a classifier, with method.type "classification"'
            raise InvalidInput(message, param="method.type")
        data = await self._data(job, training)
        if spec.form == LORA:
            lora, warnings = await self._lora.prepare(attempt, data, objective, saved)
            is_costly = lora.progress.step == 0 and lora.factors.preset.method is not None
            messages: list[tuple[str, dict[str, Any] | None]] = [(form_message(lora), None)]
            return Prepared(lora, messages, is_costly, [*data_warnings(data), *warnings])
        if spec.calibration == OWN_DATA:
            calibration: Calibration | None = await asyncio.to_thread(own_calibration, data, training)
        else:
            calibration = await self._calibration(job)
        found = await self._bases.of(attempt, calibration)
        init = InitChoice.of(spec)
        planned = plan_run(spec, data, found.basis, init, self._base, objective, may_search=self._may_search)
        warnings, messages = (
            data_warnings(planned.data, is_judged_by_folds=planned.has_folds),
            [(found.message, None)],
        )
        if saved is not None:
            run = planned.make(job.job_id)
            unusable = await asyncio.to_thread(checkpoint.try_restore, run, saved)
            if not unusable:
                return Prepared(run, messages, warnings=warnings)
            warnings += unusable
        start = await self._initialize(attempt, init, found, planned.data, planned.plan)
        run = planned.make(job.job_id, found.basis.fold(start.R0.double()))
        run.init_notes = start.notes
        messages.append((init_message(start), start.notes))
        return Prepared(run, messages, init.needs_model, warnings)

    async def _classifier(self, attempt: Attempt, training: bytes, saved: bytes | None) -> Prepared:
        """Return the run of a job that trains a classifier. Raises the same errors as `prepare`."""
        job, spec = attempt.job, attempt.job.spec
        labelled = await read_job_data(
            chat_of(self._chat, job),
            spec,
            training,
            await self._validation(job),
            max_tokens=self._max_tokens,
        )
        run, messages, warnings = await self._classification.prepare(
            attempt, labelled, await self._calibration(job), saved
        )
        notes: list[tuple[str, dict[str, Any] | None]] = [(message, None) for message in messages]
        return Prepared(run, notes, warnings=[*data_warnings(labelled.data), *warnings])

    async def build(self, attempt: Attempt) -> JobBasis:
        """Return the basis of a job that only builds one. Raises the same errors as `prepare`."""
        spec = attempt.job.spec
        self._check_model(spec)
        if spec.calibration == OWN_DATA:
            raise InvalidInput(
                "a job without training data cannot use it for calibration", param="calibration"
            )
        return await self._bases.of(attempt, await self._calibration(attempt.job))

    def _check_model(self, spec: JobSpec) -> None:
        if spec.base_model != self._base.name:
            raise InvalidInput(
                f"the job is for base model {spec.base_model!r}; this worker trains {self._base.name!r}",
                param="model",
            )

    async def _validation(self, job: Job) -> bytes | None:
        if job.spec.validation_file is None:
            return None
        return await self._content(job.tenant, job.spec.validation_file, "validation_file")

    async def _data(self, job: Job, training: bytes) -> TrainingData:
        validation, chat = await self._validation(job), chat_of(self._chat, job)
        return await asyncio.to_thread(
            read_files,
            chat,
            job.spec,
            training,
            validation,
            max_tokens=self._max_tokens,
            max_examples=self._max_examples,
        )

    async def _content(self, tenant: str, file_id: str, param: str) -> bytes:
        try:
            return await self._files.content(tenant, file_id)
        except NotFound as error:
            raise NotFound(f"{param}: {error.message}", param=param, code=error.code) from error

    async def _calibration(self, job: Job) -> Calibration | None:
        """Return the examples that the basis is built from; None if it is built from the weights alone."""
        if job.spec.calibration is None or job.spec.basis_id is not None:
            return None
        content = await self._content(job.tenant, job.spec.calibration, "calibration")
        chat = chat_of(self._chat, job)
        try:
            return await asyncio.to_thread(
                read_calibration,
                chat,
                content,
                max_tokens=self._max_tokens,
                max_examples=self._max_examples,
            )
        except InvalidTrainingData as error:
            raise InvalidTrainingData(
                error.errors, param="calibration", code=error.code, num_problems=error.num_problems
            ) from error

    async def _initialize(
        self, attempt: Attempt, init: InitChoice, found: JobBasis, data: TrainingData, plan: TrainingPlan
    ) -> Initialization:
        """R_0 in trained coordinates. Holds the model lock if it takes passes through the model."""
        spec = attempt.job.spec
        options = init.fill_options(plan)
        adapter, adapter_basis = await self._warm_start_adapter(attempt.job.tenant, spec, found.basis)
        if init.method == BASE_MODEL:  # nothing to compute
            M, r = found.basis.num_modules, found.basis.rank
            return Initialization(torch.zeros(M, r, r), {"method": BASE_MODEL, "options": options})

        def work(progress: Progress) -> Initialization:
            request = InitInputs(
                basis=found.basis,
                base=self._base,
                calibration=CalibrationSet.from_encoded(data.answers) if init.needs_model else None,
                step=init.step_of(found, spec, options),
                adapter=adapter,
                adapter_basis=adapter_basis,
                progress=progress,
            )
            return compute_init(request, method=init.method, **options)

        if not init.needs_model:
            return await asyncio.to_thread(work, lambda done, total: None)
        modules = [module.name for module in found.basis.manifest.modules]
        return await self._model_lock.run(work, modules=modules, on_progress=attempt.listener.note_modules)

    async def _warm_start_adapter(
        self, tenant: str, spec: JobSpec, basis: Basis
    ) -> tuple[Adapter | None, Basis | None]:
        """Return the adapter that training continues, named as in a request.

        Returned with its basis, unless that is the job's.
        """
        if spec.warm_start_from is None:
            return None, None
        named = parse_version_name(spec.warm_start_from)
        if named is None:
            raise InvalidInput(f"{spec.warm_start_from!r} names no adapter", param="model")
        ref = await self._adapters.resolve(tenant, *named)
        [blob] = await self._adapters.fetch([ref])
        other = None if ref.basis_id == basis.basis_id else await self._bases.get(tenant, ref.basis_id)
        # Raises `AdapterReplaced` if the version was replaced in between; then the caller repeats the call.
        adapter = await asyncio.to_thread(Adapter.of_version, ref, blob, (other or basis).cores)
        return adapter, other


def objective_of(spec: JobSpec) -> Objective:
    """Return what the job minimises. Raises `InvalidInput`."""
    if spec.objective not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        message = f"this release trains by the methods {known}; the job has {spec.objective!r}"
        raise InvalidInput(message, param="method.type")
    if spec.objective == DPO:
        return Preference.of(spec.objective_options)
    return SUPERVISED


def chat_of(chat: ChatFormat, job: Job) -> ChatFormat:
    """Return the chat format with the date of the job's creation, so that all attempts encode alike."""
    return chat.at(datetime.fromtimestamp(job.created_at, UTC))


def own_calibration(data: TrainingData, content: bytes) -> Calibration:
    """Return the training examples as calibration data. content: the content of their file."""
    return Calibration(CalibrationSet.from_encoded(data.answers), hashlib.sha256(content).hexdigest())


def read_calibration(
    chat: ChatFormat, content: bytes, *, max_tokens: int, max_examples: int = MAX_EXAMPLES
) -> Calibration:
    """Return the examples of a file, as a `Population` if they name users. Raises `InvalidTrainingData`."""
    examples = ExampleFile(content, with_users=True, max_examples=max_examples)
    data = encode_data(chat, examples, max_tokens=max_tokens, validation=[])
    calibration = own_calibration(data, content)
    if next(iter(examples)).user is None:
        return calibration
    users: dict[str | None, list[EncodedExample]] = {}
    for example, rows in zip(examples, data.train_examples, strict=True):
        users.setdefault(example.user, []).extend(rows)
    population = Population.of([CalibrationSet.from_encoded(user) for user in users.values()])
    return replace(calibration, examples=population)


def read_files(
    chat: ChatFormat,
    spec: JobSpec,
    training: bytes,
    validation: bytes | None,
    *,
    max_tokens: int,
    max_examples: int = MAX_EXAMPLES,
) -> TrainingData:
    """Parse and encode the files of a job as it asks for. max_tokens: the limit of the worker.

    Raises `InvalidTrainingData`, `InvalidInput`.
    """
    given = spec.hyperparameters
    check_together(given, has_validation_file=validation is not None)
    return read_data(
        chat,
        training,
        validation,
        is_preference=spec.objective == DPO,
        max_tokens=max_example_tokens(given, max_tokens),
        share=validation_share(given),
        max_examples=max_examples,
    )


def read_data(
    chat: ChatFormat,
    training: bytes,
    validation: bytes | None,
    *,
    max_tokens: int,
    share: float | None = None,
    is_preference: bool = False,
    max_examples: int = MAX_EXAMPLES,
) -> TrainingData:
    """Parse and encode the files. Without a validation file, a `share` of the examples is held back.

    is_preference: the files hold pairs. Raises `InvalidTrainingData`, and `InvalidInput` for a file of
    labelled texts.
    """
    if is_preference:
        pairs = parse_pairs(training, max_pairs=max_examples)
        held_out_pairs = None if validation is None else parse_pairs(validation, max_pairs=max_examples)
        data = encode_pairs(chat, pairs, max_tokens=max_tokens, validation=held_out_pairs, share=share)
        return replace(data, statistics=statistics_of_pairs(pairs))
    if is_labelled(training):
        message = 'the file holds labelled texts; train on it with "method": {"type": "classification"}'
        raise InvalidInput(message, param="method.type")
    examples = ExampleFile(training, max_examples=max_examples)
    held_out = None if validation is None else ExampleFile(validation, max_examples=max_examples)
    data = encode_data(chat, examples, max_tokens=max_tokens, validation=held_out, share=share)
    return replace(data, statistics=statistics_of(examples))


def data_warnings(data: TrainingData, *, is_judged_by_folds: bool = False) -> list[tuple[str, str]]:
    """Return warnings about the data for their owner, as (code, sentence)."""
    warnings = []
    if data.num_truncated:
        message = f"{data.num_truncated} example(s) were too long and have been truncated"
        warnings.append(("truncated", message))
    if data.num_overlapping:
        message = f"{data.num_overlapping} example(s) of the validation file are also in the training file"
        warnings.append(("validation_overlap", message))
    counts = data.statistics
    if counts is not None:
        num_repeated = counts.num_duplicates + counts.num_near_duplicates
        if num_repeated >= MANY_DUPLICATES * counts.num_examples:
            message = f"{num_repeated} of {counts.num_examples} examples are equal or nearly equal to others"
            warnings.append(("many_duplicates", message))
    if not data.valid and not is_judged_by_folds:
        message = "no examples are held back for validation: the last state is published, not the best"
        warnings.append(("no_validation", message))
    return warnings
