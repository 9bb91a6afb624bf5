"""The settings: whether each TESSERA_ variable is known to an installed process, and has a usable value."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from tessera.cli.applications import find_root, missing_requirements, repository_url
from tessera.cli.doctor.findings import Finding, ok, problem, warning
from tessera.errors import TesseraError
from tessera.settings import PREFIX, CommonSettings, unknown_variables, variable_of

#: The settings of the applications, by the prefix of their variables. They are looked up by name, because the
#: library must not import applications, which may not be installed.
APPLICATION_SETTINGS = {
    "TESSERA_SERVICE_": "service.settings:ServiceSettings",
    "TESSERA_ENGINE_": "service.engine.settings:EngineSettings",
    "TESSERA_WORKER_": "trainer_worker.settings:WorkerSettings",
}
#: This function refuses to listen beyond loopback without API keys.
_REFUSE_OPEN_DOOR = "service.settings:refuse_open_door"
_WHERE = "docs/operations.md lists all settings with their defaults"


@dataclass(frozen=True)
class Settings:
    """The settings that could be read, and findings about the others.

    A field is None if its settings are unusable or its application is not installed.
    """

    findings: list[Finding]
    common: CommonSettings | None
    service: Any = None
    worker: Any = None


def read() -> Settings:
    """Read the settings of all processes from the environment."""
    root = find_root()
    findings = [_installation()]
    classes: dict[str, type[BaseSettings]] = {PREFIX: CommonSettings}
    if root is not None:
        sys.path.insert(0, str(root))  # so that an unrelated package `service` does not come first
        classes |= {section: pkgutil.resolve_name(name) for section, name in APPLICATION_SETTINGS.items()}
    sections = tuple(section for section in classes if section != PREFIX)
    unknown = [
        problem("settings", f"{variable} is not a setting{hint}", f"correct or unset it; {_WHERE}")
        for variable, hint in unknown_variables(*classes.values(), sections=sections)
    ]
    values: dict[str, Any] = {}
    unusable: list[Finding] = []
    for section, cls in classes.items():
        try:
            values[section] = cls()
        except ValidationError as error:
            unusable += _unusable(cls, error)
    service = values.get("TESSERA_SERVICE_")
    if service is not None:
        try:
            pkgutil.resolve_name(_REFUSE_OPEN_DOOR)(service)
        except TesseraError as error:
            message, _, advice = error.message.partition(": ")
            unusable.append(problem("settings", message, advice))
    findings += unknown + unusable
    if not unknown and not unusable:
        findings.append(ok("settings", _summary(values)))
    return Settings(findings, values.get(PREFIX), service, values.get("TESSERA_WORKER_"))


def _installation() -> Finding:
    root = find_root()
    if root is None:
        return warning(
            "installation",
            "only the library is installed: `tessera serve`, `worker` and `demo` have nothing to start",
            f"clone {repository_url()} and run `make serve` in it, if you want to serve or train",
        )
    if missing := missing_requirements():
        return problem(
            "installation",
            f"the service in {root} lacks {', '.join(missing)}",
            f"run `pip install -e '.[service,embedded]'` in {root}",
        )
    return ok("installation", f"service and trainer worker in {root}")


def _unusable(cls: type[BaseSettings], error: ValidationError) -> Iterator[Finding]:
    for detail in error.errors():
        variable = variable_of(cls, str(detail["loc"][0])) if detail["loc"] else "the environment"
        about = next(
            (field.description for name, field in cls.model_fields.items() if name in detail["loc"]), None
        )
        yield problem(
            "settings",
            f"{variable}={detail['input']!r}: {detail['msg']}",
            f"{variable}: {about}; {_WHERE}" if about else _WHERE,
        )


def _summary(values: dict[str, Any]) -> str:
    changed = sorted(
        variable_of(type(settings), name)
        for settings in values.values()
        for name in settings.model_fields_set
    )
    return f"set: {', '.join(changed)}" if changed else "all at their defaults"
