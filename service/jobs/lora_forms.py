"""Check requests for a LoRA form: A and B are trained, and become a private basis of the tenant.

Knows no HTTP. `tessera/methods/forms.py` defines the forms.
"""

from __future__ import annotations

from dataclasses import replace

from service.jobs.basis_choices import BasisChoice, BasisChoices
from service.jobs.recipes import InitRequest, ParamNames, RecipeRequest
from tessera.errors import InvalidInput, QuotaExceeded
from tessera.formats.adapter_ref import MAX_RANK
from tessera.methods.catalogue import FORMS, FormEntry
from tessera.methods.scaling import NO_SCALING, Scaling
from tessera.queue.records import OWN_DATA
from tessera.store.files import FileRecord

LORA_FORM = "lora"
#: The form that "lora" alone means.
DEFAULT_INIT = "lora"
#: The fewest bytes per number of the result: a worker stores the result of a model in half precision in half
#: precision. The precision is unknown here, so the worker checks the quota again before it begins.
LEAST_ITEM_BYTES = 2

_NAMES = replace(ParamNames.of_name("adapter.init"), target_modules="adapter.target_modules")


async def lora_choice(
    choices: BasisChoices,
    tenant: str,
    init: InitRequest | None,
    *,
    rank: int,
    training: FileRecord,
    target_modules: list[str] | None = None,
    rank_pattern: dict[str, int] | None = None,
    scaling: Scaling = NO_SCALING,
) -> BasisChoice:
    """Return the basis part of a LoRA-form job's specification, checked as far as possible without the
    weights.

    Raises `InvalidInput` that names the parameter, and `QuotaExceeded`.
    """
    request = init or InitRequest(DEFAULT_INIT)
    preset = _checked(request, rank)
    if scaling.is_given and "scale" in request.options:
        message = "adapter.init.options.scale is the same number; give one of them"
        raise InvalidInput(message, param="adapter.alpha" if scaling.scale is None else "adapter.scale")
    stored_rank = preset.stored_rank(max(rank, *rank_pattern.values()) if rank_pattern else rank)
    stored_pattern = {key: preset.stored_rank(one) for key, one in (rank_pattern or {}).items()}
    if stored_rank > MAX_RANK:
        message = f"{preset.name} stores rank {rank} as rank {stored_rank}, above the limit of {MAX_RANK}"
        raise InvalidInput(message, param="adapter.rank")
    try:
        recipe = RecipeRequest(
            request.method, target_modules=target_modules, rank_pattern=stored_pattern, names=_NAMES
        )
        shapes = await choices.targets(recipe, preset.stored_rank(rank))
    except InvalidInput as error:
        why = "" if stored_rank == rank else f"; {preset.name} stores it as rank {stored_rank}"
        raise InvalidInput(f"{error.message}{why}", param=error.param) from error
    try:
        quota_bytes = await choices.check_quota(tenant, stored_rank, shapes, item_bytes=LEAST_ITEM_BYTES)
    except QuotaExceeded as error:
        raise QuotaExceeded(error.message, param="adapter.form", code=error.code) from error
    needs_examples = preset.needs_examples(request.options)
    return BasisChoice(
        preset.name,
        rank,
        options=request.options,
        target_modules=target_modules,
        rank_pattern=rank_pattern,
        calibration=OWN_DATA if needs_examples else None,
        calibration_bytes=training.bytes if needs_examples else 0,
        quota_bytes=quota_bytes,
    )


def _checked(request: InitRequest, rank: int) -> FormEntry:
    if request.method not in FORMS:
        known = ", ".join(FORMS)
        raise InvalidInput(f"unknown LoRA form {request.method!r}; known: {known}", param="adapter.init")
    preset = FORMS[request.method]
    try:
        preset.check_options(request.options, rank)
    except InvalidInput as error:
        param = "adapter.rank" if error.param == "rank" else f"adapter.init.options.{error.param}"
        raise InvalidInput(error.message, param=param) from error
    return preset
