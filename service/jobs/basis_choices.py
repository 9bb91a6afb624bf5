"""Choose the basis of a job: a stored one that the caller may use, or a recipe that can work on this model.

Everything that can be checked without the weights is checked here, before a job is queued: methods, options,
data, the rank against every target module, and the caller's quota for private bases.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from service.jobs.recipes import RecipeRequest, checked_recipe
from service.jobs.upload_check import EXAMPLES, LABELLED, PAIRS
from service.jobs.uploads import FINE_TUNE, PURPOSES
from tessera.errors import InvalidInput, NotFound, QuotaExceeded, UnsupportedModel
from tessera.formats.manifest import ModuleShape
from tessera.methods.catalogue import METHODS
from tessera.model.rank_pattern import module_ranks
from tessera.model.target_modules import check_patterns, check_rank, choose_targets
from tessera.queue.records import OWN_DATA
from tessera.settings import CommonSettings
from tessera.store.files import FileRecord, FileStore
from tessera.store.holds import BasisHolds, source_key
from tessera.store.manifests import BasisManifests
from tessera.store.ownership import PrivateBases

#: Bytes per number of a stored basis (`tessera.formats.basis.storage_dtype`).
ITEM_BYTES = 2


@dataclass(frozen=True)
class BasisChoice:
    """The part of a job's specification that describes its basis."""

    method: str
    rank: int
    #: A stored basis; None: the job builds one.
    basis_id: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    #: None: those of the settings.
    target_modules: list[str] | None = None
    #: The ranks of modules that have another; None: none has.
    rank_pattern: dict[str, int] | None = None
    calibration: str | None = None
    #: Size of the calibration file.
    calibration_bytes: int = 0
    #: Bytes that the basis will take of the tenant's quota; 0 if it is shared or stored already.
    quota_bytes: int = 0

    @property
    def spec_fields(self) -> dict[str, Any]:
        """The fields of a `JobSpec` that describe the basis."""
        return {
            "method": self.method,
            "rank": self.rank,
            "basis_id": self.basis_id,
            "basis_options": self.options,
            "target_modules": self.target_modules,
            "rank_pattern": self.rank_pattern,
            "calibration": self.calibration,
        }


#: What to say about a file that a job cannot use, by the kind of its lines.
_WRONG_KIND = {
    EXAMPLES: "holds conversations, prompts or texts, on which only the method supervised trains",
    PAIRS: "holds preference pairs, on which only the method dpo trains",
    LABELLED: "holds labelled texts, on which only the method classification trains",
}


class BasisChoices:
    """Checks the bases that requests name against the base model's layers and the stores."""

    def __init__(
        self,
        *,
        bases: BasisManifests,
        private_bases: PrivateBases,
        holds: BasisHolds,
        files: FileStore,
        layers: Callable[[], Awaitable[Mapping[str, ModuleShape]]],
        settings: CommonSettings,
    ) -> None:
        """layers: the base model's linear layers by name."""
        self._bases = bases
        self._private_bases = private_bases
        self._holds = holds
        self._files = files
        self._layers = layers
        self._settings = settings

    async def stored(self, tenant: str, basis_id: str) -> BasisChoice:
        """Choose a stored basis. Raises `NotFound`, also for another tenant's private basis."""
        try:
            await self._private_bases.check_access(tenant, basis_id)
            manifest = await self._bases.manifest(basis_id)
        except NotFound as error:
            raise NotFound(error.message, param="adapter.basis", code=error.code) from error
        return BasisChoice(manifest.method, manifest.rank, basis_id)

    async def recipe(
        self, tenant: str, request: RecipeRequest, *, rank: int | None, training: FileRecord | None = None
    ) -> BasisChoice:
        """Choose a basis to be built. training: the file of a training job.

        Raises `InvalidInput`, `NotFound`, `QuotaExceeded`.
        """
        rank = rank or self._settings.rank
        recipe = checked_recipe(request, rank)
        if set(recipe.target_modules or ()) == set(self._settings.target_modules):
            recipe = replace(recipe, target_modules=None)
        shapes = await self.targets(recipe, rank)
        data = training
        if recipe.calibration is not None and (training is None or recipe.calibration != OWN_DATA):
            data = await self.file(tenant, recipe.calibration, recipe.names.calibration, purposes=PURPOSES)
        choice = BasisChoice(
            recipe.method,
            rank,
            options=recipe.options,
            target_modules=recipe.target_modules,
            rank_pattern=recipe.rank_pattern,
            calibration=recipe.calibration,
            calibration_bytes=0 if recipe.calibration is None or data is None else data.bytes,
        )
        if any((recipe.calibration, recipe.options, recipe.target_modules, recipe.rank_pattern)):
            sha256 = "" if recipe.calibration is None or data is None else data.sha256
            quota_bytes = await self._check_recipe_quota(tenant, choice, recipe, sha256, shapes)
            return replace(choice, quota_bytes=quota_bytes)
        return choice

    async def file(
        self,
        tenant: str,
        file_id: str,
        param: str,
        *,
        purposes: Sequence[str] = (FINE_TUNE,),
        kind: str = EXAMPLES,
    ) -> FileRecord:
        """Return the record of a file for one of `purposes`, whose lines are of the kind. Raises `NotFound`,
        `InvalidInput` with the parameter."""
        try:
            record = await self._files.get(tenant, file_id)
        except NotFound as error:
            raise NotFound(error.message, param=param, code=error.code) from error
        if record.purpose not in purposes:
            allowed = " or ".join(map(repr, purposes))
            message = f"file {file_id} has the purpose {record.purpose!r}, but {allowed} is required here"
            raise InvalidInput(message, param=param)
        if record.content_kind in _WRONG_KIND and record.content_kind != kind:
            raise InvalidInput(f"file {file_id} {_WRONG_KIND[record.content_kind]}", param=param)
        return record

    async def targets(self, recipe: RecipeRequest, rank: int) -> list[ModuleShape]:
        """Return the layers that a recipe targets. Raises `UnsupportedModel`, and `InvalidInput` for the
        rank."""
        layers = await self._layers()
        patterns = recipe.target_modules or self._settings.target_modules
        found = [layers[name] for name in choose_targets(list(layers), patterns)]
        if recipe.target_modules or not found:
            try:
                check_patterns(list(layers), patterns)
            except UnsupportedModel as error:
                raise UnsupportedModel(error.message, param=recipe.names.target_modules) from error
        try:
            ranks = module_ranks([shape.name for shape in found], rank, recipe.rank_pattern)
        except InvalidInput as error:
            raise InvalidInput(error.message, param="adapter.rank_pattern") from error
        try:
            for one, shape in zip(ranks, found, strict=True):
                check_rank(one, shape)
        except InvalidInput as error:
            raise InvalidInput(error.message, param=recipe.names.rank) from error
        return found

    async def check_targets(self, basis_id: str, patterns: Sequence[str], *, param: str) -> None:
        """Raise `InvalidInput` with `param` unless the patterns choose the modules of a stored basis."""
        manifest = await self._bases.manifest(basis_id)
        stored = {module.name for module in manifest.modules}
        asked = set(choose_targets(list(await self._layers()), patterns))
        if asked != stored:
            message = f"basis {basis_id} has {len(stored)} modules, of which these patterns choose "
            message += f"{len(asked & stored)}, and {len(asked - stored)} others; leave them out"
            raise InvalidInput(message, param=param)

    async def check_quota(
        self, tenant: str, rank: int, shapes: Sequence[ModuleShape], *, item_bytes: int = ITEM_BYTES
    ) -> int:
        """Return the bytes of a basis of these shapes, which fits into the tenant's quota.

        Raises `QuotaExceeded`.
        """
        size = item_bytes * rank * sum(shape.d_in + shape.d_out for shape in shapes)
        await self._holds.check_quota(tenant, size)
        return size

    async def _check_recipe_quota(
        self, tenant: str, choice: BasisChoice, recipe: RecipeRequest, sha256: str, shapes: list[ModuleShape]
    ) -> int:
        """Return what the basis, which will be private, takes of the tenant's quota. Raises `QuotaExceeded`.

        A basis that was built before from the same data needs no further quota.
        """
        key = source_key(
            choice.method,
            choice.rank,
            options=choice.options,
            target_modules=choice.target_modules,
            rank_pattern=choice.rank_pattern,
            calibration=choice.calibration,
            sha256=sha256,
        )
        if await self._holds.find(tenant, key) is not None:
            return 0
        if not METHODS[choice.method].stores_factors(choice.options):
            return 0
        try:
            largest = max(choice.rank, *(choice.rank_pattern or {}).values(), 1)
            return await self.check_quota(tenant, largest, shapes)
        except QuotaExceeded as error:
            raise QuotaExceeded(error.message, param=recipe.names.method, code=error.code) from error
