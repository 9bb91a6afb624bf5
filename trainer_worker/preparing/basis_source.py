"""The basis of a job: stored already, found by its recipe, or built now.

A basis that depends only on the base model, a method and a rank is shared by all tenants. One that is built
from a tenant's data, or with options of its choice, belongs to the tenant and counts against its quota
(`ownership.py`). Both kinds are named by their recipe and the digest of the data, so a second attempt, or
another job with the same recipe, finds what was built before.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from tessera.errors import QuotaExceeded, Unavailable
from tessera.formats.basis import DTYPES, Basis, storage_dtype
from tessera.methods.bases import BuiltBasis, CalibrationSet, build_basis_and_step, find_method
from tessera.methods.options import fill_options
from tessera.model.base_model import BaseModel, iter_target_modules
from tessera.queue.records import Job, JobSpec
from tessera.store.bases import BasisStore, read_if_sound, recipe_key
from tessera.store.holds import BasisHolds, source_key
from tessera.store.ownership import PrivateBases
from trainer_worker.common.model_lock import ModelLock, Progress
from trainer_worker.common.waits import retrying

#: Bases kept in memory between jobs; one of an 8B model at r = 16 is 84 MB.
MAX_CACHED_BASES = 4


class PreparationListener(Protocol):
    """Follows the preparation of a job. In a worker this is the session's `JobReporter`."""

    def note_modules(self, done: int, total: int) -> None:
        """Note that `done` of `total` modules of a basis or an initialization are finished."""

    def note_outage(self, error: Unavailable) -> None:
        """Note that the store did not answer and that the call is repeated."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a job."""

    job: Job
    listener: PreparationListener


@dataclass(frozen=True)
class Calibration:
    """The data that a basis is built from."""

    examples: CalibrationSet
    #: SHA-256 of the file with the examples.
    sha256: str


@dataclass(frozen=True)
class JobBasis:
    """The basis that a job trains in, and where it came from."""

    basis: Basis
    #: Named by its id, found by its recipe, or built for this job.
    origin: Literal["stored", "found", "built"]
    #: [M, r, r], the first step that the method computed from the same data; None if it computes none.
    step: Tensor | None = None

    @property
    def message(self) -> str:
        """A sentence about the basis for the job's owner."""
        manifest = self.basis.manifest
        origin = {"stored": "as asked for", "found": "built before", "built": "built now"}[self.origin]
        return f"Basis {manifest.basis_id[:12]}: {manifest.method}, rank {manifest.rank}, {origin}"

    def to_result(self, *, building_s: float) -> dict[str, Any]:
        """Return the result of a job that only builds a basis."""
        manifest = self.basis.manifest
        return {
            "basis_id": manifest.basis_id,
            "origin": self.origin,
            "bytes": manifest.stored_bytes,
            "num_modules": len(manifest.modules),
            "building_s": round(building_s, 2),
            "calibration": manifest.recipe.get("calibration"),
        }


class BasisSource:
    """Finds the bases of jobs, and builds those that are not stored."""

    def __init__(
        self,
        base: BaseModel,
        model_lock: ModelLock,
        *,
        bases: BasisStore,
        own: PrivateBases,
        holds: BasisHolds,
        target_modules: tuple[str, ...],
    ) -> None:
        self._base, self._model_lock = base, model_lock
        self._bases, self._own, self._holds = bases, own, holds
        self._target_modules = target_modules
        self._dtype = storage_dtype(base.model.dtype)
        self._cached: OrderedDict[str, Basis] = OrderedDict()

    async def of(self, attempt: Attempt, calibration: Calibration | None) -> JobBasis:
        """Return the basis that the job specifies. A private basis is held for the job.

        Raises `InvalidInput`, `UnsupportedModel`, `NotFound`, `QuotaExceeded`, and `BasisDeleted` if a basis
        that the job names was deleted while it was read.
        """
        job = attempt.job
        if job.spec.basis_id is not None:
            basis = await self.get(job.tenant, job.spec.basis_id)
            await self._holds.hold(job.tenant, basis.basis_id, job.job_id)
            await self._bases.manifest(basis.basis_id)  # raises if another job is still building it again
            return JobBasis(basis, "stored")
        recipe = self._recipe(job.spec)
        if is_shared(job.spec, self._target_modules):
            found = await self._get_shared(attempt, recipe)
        else:
            found = await self._get_private(attempt, recipe, calibration)
        self._cache(found.basis)
        return found

    async def get(self, tenant: str, basis_id: str) -> Basis:
        """Return a stored basis that the tenant may use. Raises `NotFound`, `CorruptRecord`."""
        await self._own.check_access(tenant, basis_id)
        if basis_id not in self._cached:
            self._cache(await self._bases.get(basis_id))
        self._cached.move_to_end(basis_id)
        return self._cached[basis_id]

    def _recipe(self, spec: JobSpec) -> dict[str, Any]:
        return {
            "method": spec.method,
            "rank": spec.rank,
            "target_modules": tuple(spec.target_modules or self._target_modules),
            **({"rank_pattern": spec.rank_pattern} if spec.rank_pattern else {}),
            **spec.basis_options,
        }

    async def _get_shared(self, attempt: Attempt, recipe: dict[str, Any]) -> JobBasis:
        name = recipe_key(self._base.model_id, **recipe)
        found = await read_if_sound(self._bases, await self._bases.find(name))
        if found is not None:
            return JobBasis(found, "found")
        built = await self._build(attempt, recipe, None)
        bases = retrying(self._bases, attempt.listener.note_outage)
        winner = await bases.put(built.basis, recipe_key=name)
        if winner == built.basis.basis_id:
            return JobBasis(built.basis, "built", built.step)
        return JobBasis(await self._bases.get(winner), "found")

    async def _get_private(
        self, attempt: Attempt, recipe: dict[str, Any], calibration: Calibration | None
    ) -> JobBasis:
        job = attempt.job
        examples = None if calibration is None else calibration.examples
        digest = None if examples is None else await asyncio.to_thread(lambda: examples.digest)
        name = recipe_key(self._base.model_id, calibration_digest=digest, **recipe)
        for is_last_try in (False, True):
            held_id = await self._holds.hold_found(job.tenant, name, job.job_id)
            found = await self._read_private(held_id)
            if found is not None:
                return found
            if held_id is not None:
                break  # it cannot be read, perhaps not yet, but it already counts against the quota
            try:
                await self._check_quota(job)
                break
            except QuotaExceeded:  # another job may have reserved this very basis in between
                if is_last_try:
                    raise
        built = await self._build(attempt, recipe, examples)
        names = [name, _source_key(job.spec, calibration)]
        return await retrying(self, attempt.listener.note_outage).store_private(job, names, built)

    async def _read_private(self, held_id: str | None) -> JobBasis | None:
        """Return the basis that the job holds; None if there is none, or if it has to be built again."""
        found = await read_if_sound(self._bases, held_id)
        return None if found is None else JobBasis(found, "found", await self._bases.step(found))

    async def store_private(self, job: Job, names: list[str], built: BuiltBasis) -> JobBasis:
        """Store a basis under the names of its recipe, and hold it for the job.

        If another job has stored it meanwhile, returns that one, which may differ in its rounding. Repeating
        the call changes nothing. Raises `QuotaExceeded`.
        """
        basis_id = built.basis.basis_id
        held_id = await self._holds.hold_found(job.tenant, names[0], job.job_id)
        found = None if held_id == basis_id else await self._read_private(held_id)
        if found is not None:
            return found
        ownership = await self._holds.reserve(job.tenant, built.basis.manifest, job.job_id, recipe_keys=names)
        if ownership is None:
            await self._bases.keep_factors(built.basis)
        else:
            await self._bases.put_private(built.basis, ownership, step=built.step)
        return JobBasis(built.basis, "built", built.step)

    async def _build(
        self, attempt: Attempt, recipe: dict[str, Any], calibration: CalibrationSet | None
    ) -> BuiltBasis:
        """Check the recipe before the job waits for the model. Raises `InvalidInput`."""
        spec = attempt.job.spec
        fill_options(spec.method, find_method(spec.method).options, spec.basis_options)
        modules = [name for name, _ in iter_target_modules(self._base.model, recipe["target_modules"])]

        def work(progress: Progress) -> BuiltBasis:
            return build_basis_and_step(
                self._base, calibration=calibration, dtype=self._dtype, progress=progress, **recipe
            )

        return await self._model_lock.run(work, modules=modules, on_progress=attempt.listener.note_modules)

    async def _check_quota(self, job: Job) -> None:
        """Check that the basis of a job fits into the tenant's quota. Raises `QuotaExceeded`."""
        if find_method(job.spec.method).stores_factors(job.spec.basis_options):
            await self._holds.check_quota(job.tenant, self._num_bytes(job.spec))

    def _num_bytes(self, spec: JobSpec) -> int:
        modules = iter_target_modules(self._base.model, spec.target_modules or self._target_modules)
        width = sum(m.in_features + m.out_features for _, m in modules)
        return DTYPES[self._dtype].itemsize * spec.largest_rank * width

    def _cache(self, basis: Basis) -> None:
        self._cached[basis.basis_id] = basis
        self._cached.move_to_end(basis.basis_id)
        while len(self._cached) > MAX_CACHED_BASES:
            self._cached.popitem(last=False)


def _source_key(spec: JobSpec, calibration: Calibration | None) -> str:
    return source_key(
        spec.method,
        spec.rank,
        options=spec.basis_options,
        target_modules=spec.target_modules,
        calibration=spec.calibration,
        sha256="" if calibration is None else calibration.sha256,
        rank_pattern=spec.rank_pattern,
    )


def is_shared(spec: JobSpec, target_modules: Sequence[str]) -> bool:
    """Whether the basis depends only on the base model, a method and a rank."""
    has_default_targets = spec.target_modules is None or tuple(spec.target_modules) == tuple(target_modules)
    is_plain = not spec.basis_options and not spec.rank_pattern
    return spec.calibration is None and is_plain and has_default_targets
