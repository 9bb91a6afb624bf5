"""Turn a request to train into a job in the queue: choose its adapter, basis, init and files.

Knows no HTTP. Needs neither the engine nor a worker: requests are accepted while both are down.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field, replace
from typing import Any

from service.generation.model_registry import ModelRegistry
from service.jobs.basis_choices import BasisChoice, BasisChoices
from service.jobs.lora_forms import LORA_FORM, lora_choice
from service.jobs.recipes import InitRequest, ParamNames, RecipeRequest, checked_init, default_init
from service.jobs.upload_check import EXAMPLES, LABELLED, PAIRS
from tessera.errors import InvalidInput
from tessera.formats.adapter_ref import AdapterRef
from tessera.methods.catalogue import INITS
from tessera.methods.scaling import NO_SCALING, Scaling
from tessera.queue.client import Job, JobQueue, JobSpec
from tessera.queue.preference import DPO, SUPERVISED
from tessera.queue.records import OWN_DATA
from tessera.redis.keys import BASIS_ID
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tessera.store.files import FileRecord

#: Fairness between tenants counts tokens. English text has about 4 bytes per token.
BYTES_PER_TOKEN = 4
#: The epochs that are assumed for "auto" here. The trainer decides by the number of examples.
AUTO_EPOCHS = 3
#: A file with more examples is trained on once.
MAX_EXAMPLES_OF_EPOCHS = 500
#: The cost of decomposing the weights, in tokens, beside the tokens that are read for it. On an H100 the
#: decomposition of the 24.8 M model took 1.3 to 3.5 s at ranks 4 and 16, and training processes some tens of
#: thousands of tokens in that time.
BUILD_COST_TOKENS = 20_000
#: The field of the request with the target modules, for errors.
TARGET_MODULES = "adapter.target_modules"
#: Adapter ids have at most 64 characters; this leaves room for "-" and 8 hex digits.
_MAX_SLUG = 55


@dataclass(frozen=True)
class JobRequest:
    """A request to train an adapter. None means the default."""

    #: The base model, or an adapter whose training continues.
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    #: None: a new id made from `suffix`.
    adapter_id: str | None = None
    rank: int | None = None
    #: The method of a basis that is built without data.
    method: str | None = None
    #: Id of a stored basis, name of a preset or method, or a recipe.
    basis: str | RecipeRequest | None = None
    init: InitRequest | None = None
    #: "core", or "lora" to train A and B, where `init` names the LoRA form.
    form: str = "core"
    #: The ranks of modules that have another; None: none has.
    rank_pattern: dict[str, int] | None = None
    #: Patterns of module names, sorted.
    target_modules: list[str] | None = None
    scaling: Scaling = NO_SCALING
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    early_stopping: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    #: The options of a job that trains a classifier (`JobSpec.classification`).
    classification: dict[str, Any] | None = None
    #: "supervised", or "dpo" with its options.
    objective: str = SUPERVISED
    objective_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Origin:
    """Where a job begins: the fields of its specification for its basis and its initialization."""

    basis: BasisChoice
    init: dict[str, Any] | None = None
    warm_start_from: str | None = None

    @property
    def cost(self) -> int:
        """Tokens that are read to build the basis."""
        return self.basis.calibration_bytes // BYTES_PER_TOKEN


@dataclass(frozen=True)
class PlannedJob:
    """A job that has been checked and is not queued."""

    spec: JobSpec
    #: Estimated tokens, which the fairness between tenants counts.
    cost: int
    #: Bytes that its basis will take of the tenant's quota.
    quota_bytes: int

    @property
    def is_shared(self) -> bool:
        """Whether its basis is one that all tenants share."""
        spec = self.spec
        is_plain = spec.calibration is None and not spec.basis_options and spec.target_modules is None
        is_plain = is_plain and spec.rank_pattern is None
        return is_plain and spec.form != LORA_FORM


class TrainingJobs:
    """Submits the training jobs of all tenants."""

    def __init__(
        self,
        queue: JobQueue,
        models: ModelRegistry,
        adapters: AdapterStore,
        choices: BasisChoices,
        *,
        settings: CommonSettings,
        is_encoder: bool = False,
    ) -> None:
        """is_encoder: the base model is an encoder, which only classifies."""
        self._is_encoder = is_encoder
        self._queue = queue
        self._models = models
        self._adapters = adapters
        self._choices = choices
        self._settings = settings

    async def submit(self, tenant: str, request: JobRequest, *, dedupe_key: str) -> Job:
        """Queue the job, once per dedupe_key. Raises what `plan` raises."""
        planned = await self.plan(tenant, request)
        return await self._queue.submit(tenant, planned.spec, cost=planned.cost, dedupe_key=dedupe_key)

    async def plan(self, tenant: str, request: JobRequest) -> PlannedJob:
        """Check the request and return the job that it would be.

        Raises `NotFound` (model, file, basis), `InvalidInput`, `QuotaExceeded`.
        """
        if self._is_encoder and request.classification is None:
            message = 'the base model is an encoder; train a classifier, with "type": "classification"'
            raise InvalidInput(message, param="method.type")
        kind = PAIRS if request.objective == DPO else EXAMPLES if request.classification is None else LABELLED
        training = await self._choices.file(tenant, request.training_file, "training_file", kind=kind)
        if request.validation_file is not None:
            await self._choices.file(tenant, request.validation_file, "validation_file", kind=kind)
        chosen = await self._choose(tenant, request, training)
        adapter_id = request.adapter_id or self._new_id(request.suffix)
        self._models.check_new_id(adapter_id)
        spec = JobSpec(
            adapter_id=adapter_id,
            deletion_count=await self._adapters.deletion_count(tenant, adapter_id),
            training_file=request.training_file,
            validation_file=request.validation_file,
            base_model=self._models.base_name,
            form=request.form,
            **chosen.basis.spec_fields,
            scale=request.scaling.scale,
            alpha=request.scaling.alpha,
            use_rslora=request.scaling.use_rslora,
            start=chosen.init,
            warm_start_from=chosen.warm_start_from,
            hyperparameters=request.hyperparameters,
            early_stopping=request.early_stopping,
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
            suffix=request.suffix,
            metadata=request.metadata,
            classification=request.classification,
            objective=request.objective,
            objective_options=request.objective_options,
        )
        cost = estimate_cost(training, request.hyperparameters) + chosen.cost
        return PlannedJob(spec, cost, chosen.basis.quota_bytes)

    async def _choose(self, tenant: str, request: JobRequest, training: FileRecord) -> _Origin:
        target = await self._models.resolve(tenant, request.model)
        if request.classification is not None:
            return await self._classifier(tenant, request, training, is_base=target.adapter is None)
        if request.form == LORA_FORM:
            return await self._lora_form(tenant, request, training, is_base=target.adapter is None)
        if target.adapter is not None:
            return await self._from_adapter(tenant, request, target.adapter, training)
        init = None if request.init is None else checked_init(request.init)
        if init is not None and INITS[init["method"]].needs_adapter:
            message = f"init {init['method']!r} continues from an adapter; name the adapter as `model`"
            raise InvalidInput(message, param="adapter.init")
        basis = await self._basis(tenant, request, training)
        if init is None and basis.basis_id is None and isinstance(request.basis, str):
            init = default_init(named_recipe(request.basis))
        return _Origin(basis, init)

    async def _classifier(
        self, tenant: str, request: JobRequest, training: FileRecord, *, is_base: bool
    ) -> _Origin:
        """Choose the basis of a classifier. Its cores begin at zero: labels say nothing about next tokens,
        which inits and the calibration of a basis learn from."""
        if request.form == LORA_FORM:
            message = "a classifier trains cores and a head; the form lora is not available for it"
            raise InvalidInput(message, param="adapter.form")
        if not is_base:
            message = "a classifier is trained from the base model; name that as `model`"
            raise InvalidInput(message, param="model")
        if request.init is not None:
            message = "a classifier begins with the base model and a head of zeros; leave adapter.init out"
            raise InvalidInput(message, param="adapter.init")
        if request.scaling.is_given:
            message = "a classifier trains cores and head at one rate, with the s of the basis; leave it out"
            raise InvalidInput(
                message, param="adapter.alpha" if request.scaling.scale is None else "adapter.scale"
            )
        basis = await self._basis(tenant, request, training)
        if basis.calibration == OWN_DATA:
            message = (
                f"method {basis.method!r} builds its basis from texts to continue, which labelled lines are "
                "not; name a calibration file in adapter.basis.calibration, or a basis that needs no data"
            )
            raise InvalidInput(message, param="adapter.basis")
        return _Origin(basis)

    async def _lora_form(
        self, tenant: str, request: JobRequest, training: FileRecord, *, is_base: bool
    ) -> _Origin:
        if request.basis is not None or request.method is not None:
            param = "adapter.method" if request.basis is None else "adapter.basis"
            message = f"a LoRA form makes its own basis from adapter.init; leave {param} out"
            raise InvalidInput(message, param=param)
        if not is_base:
            message = "a LoRA form is trained from the base model; name that as `model`"
            raise InvalidInput(message, param="model")
        choice = await lora_choice(
            self._choices,
            tenant,
            request.init,
            rank=request.rank or self._settings.rank,
            training=training,
            target_modules=request.target_modules,
            rank_pattern=request.rank_pattern,
            scaling=request.scaling,
        )
        return _Origin(choice)

    async def _from_adapter(
        self, tenant: str, request: JobRequest, adapter: AdapterRef, training: FileRecord
    ) -> _Origin:
        """Train in the adapter's own basis, or move it to another basis first, with init "warm"."""
        named = adapter.name
        init = None if request.init is None else checked_init(request.init)
        if init is not None and init["method"] != "warm":
            message = f"training continues from {named}; init {init['method']!r} would discard it"
            raise InvalidInput(message, param="adapter.init")
        if request.basis in (None, adapter.basis_id):
            return _Origin(await self._stored(tenant, request, adapter.basis_id), init, named)
        if init is None:
            raise InvalidInput(
                f"{named} belongs to another basis; init 'warm' moves it with some loss",
                param="adapter.basis",
            )
        return _Origin(await self._basis(tenant, request, training), init, named)

    async def _basis(self, tenant: str, request: JobRequest, training: FileRecord) -> BasisChoice:
        """Return the basis that the request names or describes, or the default."""
        if isinstance(request.basis, str) and BASIS_ID.fullmatch(request.basis):
            return await self._stored(tenant, request, request.basis)
        if request.basis is None:
            names = ParamNames.of_name("adapter.method")
            recipe = RecipeRequest(request.method or self._settings.method, names=names)
        elif request.method is not None:
            message = "adapter.basis already says how the basis is built; leave adapter.method out"
            raise InvalidInput(message, param="adapter.method")
        else:
            recipe = named_recipe(request.basis) if isinstance(request.basis, str) else request.basis
        _check_scale(recipe, request.scaling)
        recipe = replace(recipe, rank_pattern=request.rank_pattern)
        if request.target_modules is not None:
            names = replace(recipe.names, target_modules=TARGET_MODULES)
            recipe = replace(recipe, target_modules=request.target_modules, names=names)
        return await self._choices.recipe(tenant, recipe, rank=request.rank, training=training)

    async def _stored(self, tenant: str, request: JobRequest, basis_id: str) -> BasisChoice:
        choice = await self._choices.stored(tenant, basis_id)
        for param, requested, stored in (
            ("adapter.rank", request.rank, choice.rank),
            ("adapter.method", request.method, choice.method),
        ):
            if requested not in (None, stored):
                raise InvalidInput(
                    f"{param} is {stored!r} in basis {basis_id}, not {requested!r}", param=param
                )
        if request.rank_pattern is not None:
            message = f"basis {basis_id} says which rank its modules have; leave rank_pattern out"
            raise InvalidInput(message, param="adapter.rank_pattern")
        if request.target_modules is not None:
            await self._choices.check_targets(basis_id, request.target_modules, param=TARGET_MODULES)
        return choice

    def _new_id(self, suffix: str | None) -> str:
        return f"{slug(suffix or '') or slug(self._models.base_name) or 'adapter'}-{secrets.token_hex(4)}"


def _check_scale(recipe: RecipeRequest, scaling: Scaling) -> None:
    """Raise `InvalidInput` if the request gives two scales: one of the job, and an option of the basis."""
    if scaling.is_given and "scale" in recipe.options:
        message = f"{recipe.names.options}.scale is the same number; give one of them"
        raise InvalidInput(message, param="adapter.alpha" if scaling.scale is None else "adapter.scale")


def named_recipe(name: str) -> RecipeRequest:
    """Return the recipe of a basis that is given by the name of a method or a preset alone."""
    return RecipeRequest(name, is_name=True, names=ParamNames.of_name("adapter.basis"))


def slug(text: str) -> str:
    """Return `text` in the alphabet of adapter ids, beginning with a letter or digit; may be empty."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:_MAX_SLUG].rstrip("._-")


def estimate_cost(file: FileRecord, hyperparameters: dict[str, Any]) -> int:
    """Estimate how many tokens a job will train on."""
    epochs = hyperparameters.get("n_epochs", "auto")
    if epochs == "auto":
        epochs = 1 if (file.num_examples or 0) > MAX_EXAMPLES_OF_EPOCHS else AUTO_EPOCHS
    tokens: int = file.bytes // BYTES_PER_TOKEN
    return max(1, tokens * int(epochs))
