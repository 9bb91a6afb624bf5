"""Check the basis and the initialization of a request against the methods that exist.

Knows neither the store nor HTTP. Both are named by a method, or by a preset (one of the papers'
combinations), which may determine the other half as well:

    basis "lora_sb"      the method with the preset's options, from the caller's own data; if the request
                         names no init, the preset's init as well
    init "sb_step"       an init by its own name; init "lora_sb" is the init of that preset
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

#: Options that the training fills in, with stand-ins for the check, so that no caller has to give them.
_FROM_TRAINING = {"learning_rate": 1.0, "total_steps": 1}


@dataclass(frozen=True)
class ParamNames:
    """The names of the fields in the HTTP request, so that an error can name the field."""

    method: str = "adapter.basis.method"
    options: str = "adapter.basis.options"
    rank: str = "adapter.rank"
    calibration: str = "adapter.basis.calibration"
    target_modules: str = "adapter.basis"

    @classmethod
    def of_name(cls, param: str) -> ParamNames:
        """Return the names for a recipe that is given by a single field."""
        return cls(method=param, options=param, calibration=param, target_modules=param)


@dataclass(frozen=True)
class RecipeRequest:
    """A basis to be built."""

    #: Name of a method or a preset.
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    #: `own` (the training data) or the id of a file.
    calibration: str | None = None
    target_modules: list[str] | None = None
    #: The ranks of modules that have another; None: none has.
    rank_pattern: dict[str, int] | None = None
    #: Whether the request gives nothing but a name, from which the rest follows.
    is_name: bool = False
    names: ParamNames = field(default_factory=ParamNames)


@dataclass(frozen=True)
class InitRequest:
    """How the adapter is initialized before training."""

    #: Name of an init or a preset.
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    #: The field of the request, for errors.
    param: str = "adapter.init"


def checked_recipe(request: RecipeRequest, rank: int) -> RecipeRequest:
    """Return the recipe with its method's own name, without options that equal the defaults, and with
    calibration decided.

    Raises `InvalidInput` that names the parameter.
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
    needs_data = method.needs_data(filled)
    if needs_data and calibration is None:
        if not request.is_name:
            has_field = request.names.calibration != request.names.method
            raise InvalidInput(
                f"method {method.name!r} builds its basis from calibration data: name a file; a fine-tuning "
                f"job may also use its own data, with {OWN_DATA!r} in adapter.basis.calibration",
                param=request.names.calibration,
                code="missing_required_parameter" if has_field else None,
            )
        calibration = OWN_DATA
    if not needs_data and calibration is not None:
        raise InvalidInput(
            f"method {method.name!r} reads no calibration data with these options; leave it out",
            param=request.names.calibration,
        )
    chosen = {name: value for name, value in filled.items() if value != method.options[name].default}
    return replace(request, method=method.name, options=chosen, calibration=calibration)


def checked_init(request: InitRequest) -> dict[str, Any]:
    """Return {"method", "options"} of the init. Raises `InvalidInput` that names the parameter."""
    name, options = request.method, request.options
    if name not in INITS and name in PRESETS:
        name, options = PRESETS[name].init, {**PRESETS[name].init_options, **options}
    if name not in INITS:
        known = ", ".join(sorted({*INITS, *PRESETS}))
        raise InvalidInput(f"unknown init {request.method!r}; known: {known}", param=request.param)
    known_options = INITS[name].options
    from_training = {key: value for key, value in _FROM_TRAINING.items() if key in known_options}
    try:
        filled = fill_options(f"init {name}", known_options, {**from_training, **options})
        if "eta_init" in filled:
            fixed_eta(filled)
    except InvalidInput as error:
        param = f"{request.param}.options.{error.param}" if error.param else request.param
        raise InvalidInput(error.message, param=param) from error
    return {"method": name, "options": dict(options)}


def default_init(request: RecipeRequest) -> dict[str, Any] | None:
    """Return the init that belongs to a preset which is named as the basis; None: training begins at the base
    model.

    Where the paper's first step uses its learning rate, ours is found by a line search, because our learning
    rate is that of R, about a thousand times the paper's of W (bundled model, 45 examples, r = 8: loss 4.93
    at the base, 9.73 after a step with the learning rate, 4.20 after the line search).
    """
    preset = PRESETS.get(request.method)
    if preset is None or not request.is_name or INITS[preset.init].needs_adapter:
        return None
    options = {} if preset.caller_sets else dict(preset.init_options)
    return {"method": preset.init, "options": options}


def _method_of(request: RecipeRequest) -> tuple[MethodEntry, Mapping[str, Any]]:
    """Return the method, and the given options on top of the preset's options if a preset named the
    method."""
    preset = PRESETS.get(request.method)
    name = request.method if preset is None else preset.basis
    if name not in METHODS:
        known = ", ".join(sorted({*METHODS, *PRESETS}))
        raise InvalidInput(f"unknown method {request.method!r}; known: {known}", param=request.names.method)
    return METHODS[name], request.options if preset is None else {**preset.basis_options, **request.options}


def _param_of(error: InvalidInput, names: ParamNames) -> str:
    """Return the field of the request to which a method's error about its rank or options refers."""
    if error.param == "rank":
        return names.rank
    return names.method if error.param is None else f"{names.options}.{error.param}"
