"""The basis of a job: stored already, found by its recipe, or built now.

A basis that follows from the base model, a method and a rank alone is everybody's. One that is built from
somebody's data, or with options of somebody's choice, is the tenant's own and counts against its quota
(`ownership.py`). Either is named by its recipe, with the digest of the data, so a job that is tried again,
or another one like it, gets what was built before.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tessera.errors import QuotaExceeded, Unavailable
from tessera.formats.basis import DTYPES, Basis, storage_dtype
from tessera.methods.bases import BuiltBasis, CalibrationSet, build_basis_and_step, find_method
from tessera.methods.building.method import fill_options
from tessera.model.base_model import BaseModel, iter_target_modules
from tessera.queue.records import Job, JobSpec
from tessera.store.bases import BasisStore, read_if_sound, recipe_key
from tessera.store.holds import BasisHolds, source_key
from tessera.store.ownership import PrivateBases
from trainer_worker.common.commands import until_available
from trainer_worker.common.job_basis import JobBasis
from trainer_worker.common.model_lock import ModelLock, Progress

#: Bases kept in memory between jobs; one of an 8B model at r = 16 is 84 MB.
MAX_CACHED_BASES = 4


@dataclass(frozen=True)
class Attempt:
    """One try at a job, as those who prepare it see it. on_progress(done, total) counts modules."""

    job: Job
    on_progress: Progress
    note_outage: Callable[[Unavailable], None]


@dataclass(frozen=True)
class Calibration:
    """What a basis is built of. sha256: of the file that the examples are from."""

    examples: CalibrationSet
    sha256: str


class BasisSource:
    """Finds and builds."""

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
        """The basis that the job's specification asks for; an own one is held for the job.

        Raises `InvalidInput`, `UnsupportedModel`, `NotFound`, `QuotaExceeded`, and `BasisDeleted` if a basis
        that the job names was deleted while it was read.
        """
        job = attempt.job
        if job.spec.basis_id is not None:
            basis = await self.get(job.tenant, job.spec.basis_id)
            await self._holds.hold(job.tenant, basis.basis_id, job.job_id)
            await self._bases.manifest(basis.basis_id)  # what another job is building again is not there yet
            return JobBasis(basis, "stored")
        recipe = self._recipe(job.spec)
        if is_shared(job.spec, self._target_modules):
            found = await self._everybodys(attempt, recipe)
        else:
            found = await self._tenants(attempt, recipe, calibration)
        self._keep(found.basis)
        return found

    async def get(self, tenant: str, basis_id: str) -> Basis:
        """A stored basis that the tenant may use. Raises `NotFound`, `CorruptRecord`."""
        await self._own.check_access(tenant, basis_id)
        if basis_id not in self._cached:
            self._keep(await self._bases.get(basis_id))
        self._cached.move_to_end(basis_id)
        return self._cached[basis_id]

    def _recipe(self, spec: JobSpec) -> dict[str, Any]:
        """Raises `InvalidInput`: what cannot work must not wait for the model."""
        fill_options(spec.method, find_method(spec.method).options, spec.basis_options)
        return {
            "method": spec.method,
            "rank": spec.rank,
            "target_modules": tuple(spec.target_modules or self._target_modules),
            **spec.basis_options,
        }

    async def _everybodys(self, attempt: Attempt, recipe: dict[str, Any]) -> JobBasis:
        name = recipe_key(self._base.model_id, **recipe)
        found = await read_if_sound(self._bases, await self._bases.find(name))
        if found is not None:
            return JobBasis(found, "found")
        built = await self._build(attempt, recipe, None)
        winner = await until_available(
            lambda: self._bases.put(built.basis, recipe_key=name), attempt.note_outage
        )
        if winner == built.basis.basis_id:
            return JobBasis(built.basis, "built", built.step)
        return JobBasis(await self._bases.get(winner), "found")

    async def _tenants(
        self, attempt: Attempt, recipe: dict[str, Any], calibration: Calibration | None
    ) -> JobBasis:
        job = attempt.job
        examples = None if calibration is None else calibration.examples
        digest = None if examples is None else await asyncio.to_thread(lambda: examples.digest)
        name = recipe_key(self._base.model_id, calibration_digest=digest, **recipe)
        for is_last_look in (False, True):
            held_id = await self._holds.hold_found(job.tenant, name, job.job_id)
            found = await self._read_own(held_id)
            if found is not None:
                return found
            if held_id is not None:
                break  # not readable, perhaps not yet; it is counted already
            try:
                await self._check_quota(job)
                break
            except QuotaExceeded:  # another job may have reserved this very basis since the look
                if is_last_look:
                    raise
        built = await self._build(attempt, recipe, examples)
        names = [name, _source_key(job.spec, calibration)]
        return await until_available(lambda: self._store_own(job, names, built), attempt.note_outage)

    async def _read_own(self, held_id: str | None) -> JobBasis | None:
        """A basis that the job holds; None if it holds none, or the basis has to be built again."""
        found = await read_if_sound(self._bases, held_id)
        return None if found is None else JobBasis(found, "found", await self._bases.step(found))

    async def _store_own(self, job: Job, names: list[str], built: BuiltBasis) -> JobBasis:
        """The basis that was built, or the one that another job has stored meanwhile, which may differ in its
        rounding. Repeating it changes nothing. Raises `QuotaExceeded`."""
        basis_id = built.basis.basis_id
        held_id = await self._holds.hold_found(job.tenant, names[0], job.job_id)
        found = None if held_id == basis_id else await self._read_own(held_id)
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
        modules = [name for name, _ in iter_target_modules(self._base.model, recipe["target_modules"])]

        def work(progress: Progress) -> BuiltBasis:
            return build_basis_and_step(
                self._base, calibration=calibration, dtype=self._dtype, progress=progress, **recipe
            )

        return await self._model_lock.run(work, modules=modules, on_progress=attempt.on_progress)

    async def _check_quota(self, job: Job) -> None:
        """Raises `QuotaExceeded`."""
        if find_method(job.spec.method).stores_factors(job.spec.basis_options):
            await self._holds.check_quota(job.tenant, self._size(job.spec))

    def _size(self, spec: JobSpec) -> int:
        modules = iter_target_modules(self._base.model, spec.target_modules or self._target_modules)
        width = sum(m.in_features + m.out_features for _, m in modules)
        return DTYPES[self._dtype].itemsize * spec.rank * width

    def _keep(self, basis: Basis) -> None:
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
    )


def is_shared(spec: JobSpec, target_modules: Sequence[str]) -> bool:
    """Whether the basis follows from the base model, a method and a rank alone."""
    has_default_targets = spec.target_modules is None or tuple(spec.target_modules) == tuple(target_modules)
    return spec.calibration is None and not spec.basis_options and has_default_targets
