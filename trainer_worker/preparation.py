"""From a claimed job to a run that can be trained: files, examples, basis, plan, an adapter to start from."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adapter_core.adapter import Adapter
from adapter_core.base_model import BaseModel
from adapter_core.basis import Basis
from adapter_core.basis_store import BasisStore, ensure_basis, recipe_key
from adapter_core.chat_format import ChatFormat
from adapter_core.errors import InvalidInput, NotFound
from adapter_core.examples import parse_examples
from adapter_core.file_store import FileStore
from adapter_core.job_records import Job, JobSpec
from adapter_core.store import AdapterStore
from trainer_worker.data import TrainingData, encode_data
from trainer_worker.plan import BasisKind, make_plan
from trainer_worker.run import TrainRun

#: Bases kept in memory between jobs; one of an 8B model at r = 16 is 84 MB.
MAX_CACHED_BASES = 4


@dataclass(frozen=True)
class Prepared:
    """A run that may join its trainer. warnings: (code, sentence) for the job's events."""

    run: TrainRun
    basis: Basis
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
        bases: BasisStore,
        target_modules: tuple[str, ...],
        max_tokens: int,
        quiet: asyncio.Lock,
    ) -> None:
        """quiet: held while a basis is built, because that may use the model, and training must not then."""
        self._base, self._chat = base, chat
        self._files, self._adapters, self._bases = files, adapters, bases
        self._target_modules, self._quiet = target_modules, quiet
        self._max_tokens = min(max_tokens, base.max_position)
        self._cached: OrderedDict[str, Basis] = OrderedDict()

    @property
    def model_id(self) -> str:
        return self._base.model_id

    async def prepare(self, job: Job) -> Prepared:
        """Raises `InvalidInput`, `InvalidTrainingData`, `NotFound`, `Conflict` for what the job's owner must
        mend, `Unavailable` for what time mends.
        """
        spec = job.spec
        if spec.base_model != self._base.name:
            raise InvalidInput(
                f"the job is for base model {spec.base_model!r}; this worker trains {self._base.name!r}",
                param="model",
            )
        training = await self._content(job.tenant, spec.training_file, "training_file")
        validation = None
        if spec.validation_file is not None:
            validation = await self._content(job.tenant, spec.validation_file, "validation_file")
        data = await asyncio.to_thread(
            read_data, self._chat, training, validation, max_tokens=self._max_tokens
        )
        basis = await self._basis(spec)
        plan = make_plan(
            spec.hyperparameters,
            spec.early_stopping,
            num_examples=len(data.train),
            kind=BasisKind.of(basis),
            seed=spec.seed,
        )
        start = await self._start(job.tenant, spec, basis)
        run = TrainRun(job.job_id, data, plan, basis, start=start)
        return Prepared(run, basis, data_warnings(data))

    async def _content(self, tenant: str, file_id: str, param: str) -> bytes:
        try:
            return await self._files.content(tenant, file_id)
        except NotFound as error:
            raise NotFound(f"{param}: {error.message}", param=param, code=error.code) from error

    async def _basis(self, spec: JobSpec) -> Basis:
        if spec.basis_id is not None and spec.basis_id in self._cached:
            self._cached.move_to_end(spec.basis_id)
            return self._cached[spec.basis_id]
        if spec.basis_id is not None:
            basis = await self._bases.get(spec.basis_id)
        else:
            basis = await self._default_basis(spec)
        self._cached[basis.basis_id] = basis
        while len(self._cached) > MAX_CACHED_BASES:
            self._cached.popitem(last=False)
        return basis

    async def _default_basis(self, spec: JobSpec) -> Basis:
        """The basis of (method, rank), found or built."""
        recipe: dict[str, Any] = {
            "method": spec.method,
            "rank": spec.rank,
            "target_modules": self._target_modules,
        }
        name = recipe_key(self._base.model_id, **recipe)
        if await self._bases.find(name) is not None:
            return await ensure_basis(self._bases, self._base, **recipe)
        async with self._quiet:
            return await ensure_basis(self._bases, self._base, **recipe)

    async def _start(self, tenant: str, spec: JobSpec, basis: Basis) -> Tensor | None:
        """The core of the adapter to start from, `<id>` or `<id>@<version>`. Raises `BasisMismatch`."""
        if spec.warm_start_from is None:
            return None
        adapter_id, _, version = spec.warm_start_from.partition("@")
        if version and not version.isdecimal():
            raise InvalidInput(f"{version!r} is no version of an adapter", param="model")
        ref = await self._adapters.resolve(tenant, adapter_id, int(version) if version else None)
        [blob] = await self._adapters.fetch([ref])
        if blob is None:
            raise NotFound(f"adapter {spec.warm_start_from!r} is gone", param="model", code="model_not_found")
        return Adapter.from_bytes(blob, basis_id=basis.basis_id).R


def read_data(
    chat: ChatFormat, training: bytes, validation: bytes | None, *, max_tokens: int
) -> TrainingData:
    """Parse, encode and split. Raises `InvalidTrainingData`."""
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
