"""From a claimed job to a run that can be trained: files, examples, basis, plan, where to start.

Also what is left of that for a job that only builds a basis.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.data.examples import parse_examples
from tessera.errors import Conflict, CorruptRecord, InvalidInput, InvalidTrainingData, NotFound
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.methods.bases import CalibrationSet, Population
from tessera.methods.init import Start
from tessera.model.base_model import BaseModel
from tessera.queue.records import OWN_DATA, Job, JobSpec
from tessera.store.adapters import AdapterStore
from tessera.store.files import FileStore
from trainer_worker.common.job_basis import JobBasis
from trainer_worker.common.model_lock import ModelLock, Progress
from trainer_worker.preparing.basis_source import Attempt, BasisSource, Calibration
from trainer_worker.preparing.lora_jobs import LoraPreparation
from trainer_worker.preparing.starting import StartChoice, StartSources, make_start
from trainer_worker.training import checkpoint
from trainer_worker.training.data import TrainingData, encode_data
from trainer_worker.training.lora.dedicated import LORA
from trainer_worker.training.plan import BasisKind, TrainingPlan, make_plan, max_example_tokens
from trainer_worker.training.run import TrainRun


@dataclass(frozen=True)
class Prepared:
    """A run that may join its trainer. warnings: (code, sentence) for the job's events.

    basis: None for a LoRA form. start: how the run came to its first R; None if it continues from a
    checkpoint. is_start_costly: it took passes through the model, so it is worth keeping.
    """

    run: TrainRun
    basis: JobBasis | None
    start: Start | None
    is_start_costly: bool = False
    warnings: list[tuple[str, str]] = field(default_factory=list)


class Preparation:
    """What is needed to prepare jobs: the base model, its chat format, and the stores."""

    def __init__(
        self,
        base: BaseModel,
        chat: ChatFormat,
        *,
        files: FileStore,
        adapters: AdapterStore,
        bases: BasisSource,
        lora: LoraPreparation,
        model_lock: ModelLock,
        max_tokens: int,
    ) -> None:
        self._base, self._chat = base, chat
        self._files, self._adapters, self._bases, self._model_lock = files, adapters, bases, model_lock
        self._lora = lora
        self._max_tokens = min(max_tokens, base.max_position)

    @property
    def model_id(self) -> str:
        return self._base.model_id

    async def prepare(self, attempt: Attempt, saved: bytes | None) -> Prepared:
        """The run, in the state of the checkpoint `saved` if it fits.

        Raises `InvalidInput`, `InvalidTrainingData`, `NotFound`, `Conflict` for what the job's owner must
        mend, `Unavailable` for what time mends, `TesseraError` (out_of_memory).
        """
        job, spec = attempt.job, attempt.job.spec
        self._check_model(spec)
        training = await self._content(job.tenant, spec.training_file, "training_file")
        data = await self._data(job, training)
        if spec.form == LORA:
            lora, warnings = await self._lora.prepare(attempt, data, saved)
            is_costly = lora.progress.step == 0 and lora.factors.preset.method is not None
            return Prepared(lora, None, None, is_costly, [*data_warnings(data), *warnings])
        if spec.calibration == OWN_DATA:
            calibration: Calibration | None = await asyncio.to_thread(own_calibration, data, training)
        else:
            calibration = await self._calibration(job)
        basis = await self._bases.of(attempt, calibration)
        choice = StartChoice.of(spec)
        plan = make_plan(
            spec.hyperparameters,
            spec.early_stopping,
            num_examples=data.num_train,
            kind=BasisKind.of(basis.basis, start=choice.method),
            seed=spec.seed,
        )
        warnings = data_warnings(data)
        if saved is not None:
            run = TrainRun(job.job_id, data, plan, basis.basis)
            try:
                await asyncio.to_thread(checkpoint.restore, run, saved)
                return Prepared(run, basis, None, warnings=warnings)
            except (CorruptRecord, Conflict) as error:
                warnings.append(("checkpoint_unusable", f"training starts afresh: {error.message}"))
        start = await self._start(attempt, choice, basis, data, plan)
        stored = basis.basis.fold(start.R0.double())
        run = TrainRun(job.job_id, data, plan, basis.basis, start=stored)
        run.start_notes = start.notes
        return Prepared(run, basis, start, choice.needs_model, warnings)

    async def build(self, attempt: Attempt) -> JobBasis:
        """The basis of a job that is about nothing else. Raises as `prepare`."""
        spec = attempt.job.spec
        self._check_model(spec)
        if spec.calibration == OWN_DATA:
            raise InvalidInput("a job without training data has no own calibration data", param="calibration")
        return await self._bases.of(attempt, await self._calibration(attempt.job))

    def _check_model(self, spec: JobSpec) -> None:
        if spec.base_model != self._base.name:
            raise InvalidInput(
                f"the job is for base model {spec.base_model!r}; this worker trains {self._base.name!r}",
                param="model",
            )

    async def _data(self, job: Job, training: bytes) -> TrainingData:
        validation = None
        if job.spec.validation_file is not None:
            validation = await self._content(job.tenant, job.spec.validation_file, "validation_file")
        return await asyncio.to_thread(
            read_data,
            chat_of(self._chat, job),
            training,
            validation,
            max_tokens=max_example_tokens(job.spec.hyperparameters, self._max_tokens),
        )

    async def _content(self, tenant: str, file_id: str, param: str) -> bytes:
        try:
            return await self._files.content(tenant, file_id)
        except NotFound as error:
            raise NotFound(f"{param}: {error.message}", param=param, code=error.code) from error

    async def _calibration(self, job: Job) -> Calibration | None:
        """The examples of the file that the basis is built of; None if it needs none."""
        if job.spec.calibration is None or job.spec.basis_id is not None:
            return None
        content = await self._content(job.tenant, job.spec.calibration, "calibration")
        chat = chat_of(self._chat, job)
        try:
            return await asyncio.to_thread(read_calibration, chat, content, max_tokens=self._max_tokens)
        except InvalidTrainingData as error:
            raise InvalidTrainingData(
                error.errors, param="calibration", code=error.code, num_problems=error.num_problems
            ) from error

    async def _start(
        self,
        attempt: Attempt,
        choice: StartChoice,
        basis: JobBasis,
        data: TrainingData,
        plan: TrainingPlan,
    ) -> Start:
        spec = attempt.job.spec
        options = choice.filled(plan)
        adapter, adapter_basis = await self._adapter_to_go_on_from(attempt.job.tenant, spec, basis.basis)
        examples = CalibrationSet.from_encoded(data.train)
        sources = StartSources(self._base, examples, adapter, adapter_basis)

        def work(progress: Progress) -> Start:
            return make_start(choice, options, spec=spec, basis=basis, sources=sources, progress=progress)

        if not choice.needs_model:
            return await asyncio.to_thread(work, lambda done, total: None)
        modules = [module.name for module in basis.basis.manifest.modules]
        return await self._model_lock.run(work, modules=modules, on_progress=attempt.on_progress)

    async def _adapter_to_go_on_from(
        self, tenant: str, spec: JobSpec, basis: Basis
    ) -> tuple[Adapter | None, Basis | None]:
        """`<id>` or `<id>@<version>`, with its basis if it is another one than the job's."""
        if spec.warm_start_from is None:
            return None, None
        adapter_id, _, version = spec.warm_start_from.partition("@")
        if version and not version.isdecimal():
            raise InvalidInput(f"{version!r} is no version of an adapter", param="model")
        ref = await self._adapters.resolve(tenant, adapter_id, int(version) if version else None)
        [blob] = await self._adapters.fetch([ref])
        # If the version was replaced since it was resolved, the caller asks again (`AdapterReplaced`).
        adapter = await asyncio.to_thread(Adapter.of_version, ref, blob)
        other = None if ref.basis_id == basis.basis_id else await self._bases.get(tenant, ref.basis_id)
        return adapter, other


def chat_of(chat: ChatFormat, job: Job) -> ChatFormat:
    """With the date of the job's creation: a template that asks for it must not change a later attempt."""
    return chat.at(datetime.fromtimestamp(job.created_at, UTC))


def own_calibration(data: TrainingData, content: bytes) -> Calibration:
    """The examples to train on as calibration data; content: of their file."""
    return Calibration(CalibrationSet.from_encoded(data.train), hashlib.sha256(content).hexdigest())


def read_calibration(chat: ChatFormat, content: bytes, *, max_tokens: int) -> Calibration:
    """All examples of a file; a `Population` if it says whose they are. Raises `InvalidTrainingData`."""
    examples = parse_examples(content, with_users=True)
    data = encode_data(chat, examples, max_tokens=max_tokens, validation=[])
    calibration = own_calibration(data, content)
    if examples[0].user is None:
        return calibration
    users: dict[str | None, list[EncodedExample]] = {}
    for example, rows in zip(examples, data.train_examples, strict=True):
        users.setdefault(example.user, []).extend(rows)
    population = Population.of([CalibrationSet.from_encoded(user) for user in users.values()])
    return replace(calibration, examples=population)


def read_data(
    chat: ChatFormat, training: bytes, validation: bytes | None, *, max_tokens: int
) -> TrainingData:
    """Parse, encode and hold some back to validate. Raises `InvalidTrainingData`."""
    examples = parse_examples(training)
    checks = None if validation is None else parse_examples(validation)
    return encode_data(chat, examples, max_tokens=max_tokens, validation=checks)


def data_warnings(data: TrainingData) -> list[tuple[str, str]]:
    """What the owner of the data should know before training, as (code, sentence)."""
    warnings = []
    if data.num_truncated:
        message = f"{data.num_truncated} example(s) were too long and have been truncated"
        warnings.append(("truncated", message))
    if data.num_overlapping:
        message = f"{data.num_overlapping} example(s) of the validation file are in the training file too"
        warnings.append(("validation_overlap", message))
    if not data.valid:
        message = "too few examples to hold some back: the last state is published, not the best"
        warnings.append(("no_validation", message))
    return warnings
