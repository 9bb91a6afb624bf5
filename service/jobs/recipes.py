"""What a caller says about a basis or a start, checked against what there is. Knows no store and no HTTP.

Either is named by a method or by a preset (one of the papers' combinations), whose other half it may bring:

    basis "lora_sb"      the method with the preset's options, from the caller's own data; without another
                         word, the preset's start as well
    init "sb_step"       a start by its own name; init "lora_sb" is the start of that preset
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tessera.errors import InvalidInput
from tessera.methods.catalogue import INITS, METHODS, MethodEntry
from tessera.methods.checks import fixed_eta
from tessera.methods.options import fill_options
from tessera.methods.presets import PRESETS
from tessera.queue.records import OWN_DATA

#: What only the training knows, so that nobody has to give it.
_FROM_TRAINING = {"learning_rate": 1.0, "total_steps": 1}


@dataclass(frozen=True)
class ParamNames:
    """The names of the fields in the HTTP request, so that an error names the field."""

    method: str = "adapter.basis.method"
    options: str = "adapter.basis.options"
    rank: str = "adapter.rank"
    calibration: str = "adapter.basis.calibration"
    target_modules: str = "adapter.basis"

    @classmethod
    def of_name(cls, param: str) -> ParamNames:
        """Of a recipe that is named by one field."""
        return cls(method=param, options=param, calibration=param, target_modules=param)


@dataclass(frozen=True)
class RecipeRequest:
    """A basis to be built. is_name: nothing but a name was given, so the rest follows from it."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    target_modules: list[str] | None = None
    is_name: bool = False
    names: ParamNames = field(default_factory=ParamNames)


@dataclass(frozen=True)
class InitRequest:
    """Where training is to begin."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    param: str = "adapter.init"


def checked_recipe(request: RecipeRequest, rank: int) -> RecipeRequest:
    """The recipe by its method's own name: options without those that are the defaults, calibration decided.

    Raises `InvalidInput` naming the parameter.
    """
    method, options = _method_of(request)
    try:
        filled = fill_options(method.name, method.options, options)
    except InvalidInput as error:
        raise InvalidInput(error.message, param=f"{request.names.options}.{error.param}") from error
    try:
        method.check(rank, filled)
    except InvalidInput as error:
        raise InvalidInput(error.message, param=_param_of(error, request.names)) from error
    calibration = request.calibration
    if method.needs_data and calibration is None:
        if not request.is_name:
            has_field = request.names.calibration != request.names.method
            raise InvalidInput(
                f"method {method.name!r} builds its basis from calibration data: name the file; a "
                f"fine-tuning job may also say {OWN_DATA!r} for its own, in adapter.basis.calibration",
                param=request.names.calibration,
                code="missing_required_parameter" if has_field else None,
            )
        calibration = OWN_DATA
    if not method.needs_data and calibration is not None:
        raise InvalidInput(
            f"method {method.name!r} reads no calibration data with these options",
            param=request.names.calibration,
        )
    chosen = {name: value for name, value in filled.items() if value != method.options[name].default}
    return replace(request, method=method.name, options=chosen, calibration=calibration)


def checked_start(request: InitRequest) -> dict[str, Any]:
    """{"method", "options"} of the start. Raises `InvalidInput` naming the parameter."""
    name, options = request.method, request.options
    if name not in INITS and name in PRESETS:
        name, options = PRESETS[name].start, {**PRESETS[name].start_options, **options}
    if name not in INITS:
        known = ", ".join(sorted({*INITS, *PRESETS}))
        raise InvalidInput(f"unknown start {request.method!r}; known: {known}", param=request.param)
    known_options = INITS[name].options
    told = {key: value for key, value in _FROM_TRAINING.items() if key in known_options}
    try:
        filled = fill_options(f"start {name}", known_options, {**told, **options})
        if "eta_init" in filled:
            fixed_eta(filled)
    except InvalidInput as error:
        param = f"{request.param}.options.{error.param}" if error.param else request.param
        raise InvalidInput(error.message, param=param) from error
    return {"method": name, "options": dict(options)}


def default_start(request: RecipeRequest) -> dict[str, Any] | None:
    """The start that a preset named as a basis brings; None: the base model.

    Where the paper's step is its learning rate, ours is found by a line search: this service's rate is that
    of R, about a thousand times the paper's of W (bundled model, 45 examples, r = 8: loss 4.93 at the base,
    9.73 after a step of the rate, 4.20 after the line search).
    """
    preset = PRESETS.get(request.method)
    if preset is None or not request.is_name or INITS[preset.start].needs_adapter:
        return None
    options = {} if preset.caller_sets else dict(preset.start_options)
    return {"method": preset.start, "options": options}


def _method_of(request: RecipeRequest) -> tuple[MethodEntry, Mapping[str, Any]]:
    """The method with the options given, on top of the preset's if it was named by one."""
    preset = PRESETS.get(request.method)
    name = request.method if preset is None else preset.basis
    if name not in METHODS:
        known = ", ".join(sorted({*METHODS, *PRESETS}))
        raise InvalidInput(f"unknown method {request.method!r}; known: {known}", param=request.names.method)
    return METHODS[name], request.options if preset is None else {**preset.basis_options, **request.options}


def _param_of(error: InvalidInput, names: ParamNames) -> str:
    """The field of the request that a method's objection to its rank or its options is about."""
    if error.param == "rank":
        return names.rank
    return names.method if error.param is None else f"{names.options}.{error.param}"
