"""Where a job's training begins: which start, with which options, and from whose step.

Knows no Redis. The starts themselves: `tessera/starts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tessera.errors import InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.methods.bases import CalibrationSet
from tessera.methods.building.method import fill_options
from tessera.methods.init import START_METHODS, Start, find_start
from tessera.methods.init.method import StartRequest
from tessera.model.base_model import BaseModel
from tessera.queue.records import OWN_DATA, JobSpec
from trainer_worker.common.job_basis import JobBasis
from trainer_worker.common.model_lock import Progress
from trainer_worker.training.plan import TrainingPlan

#: The start that takes the step that a method finds with its basis, and what both must agree on for that.
_SAME_STEP: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "lora_sb": ("sb_step", ("soft_sign",)),
    "lora_da": ("da_step", ("mode", "form", "damping", "damping_mode", "normalise", "use_fisher")),
    "lora_one": ("gradient", ()),
    "gradient_svd": ("gradient", ()),
}
#: What "gradient" must do to its step to give that of the method.
_NORMALISE = {"lora_one": "spectral", "gradient_svd": "none"}


@dataclass(frozen=True)
class StartChoice:
    """A start by name with the options that were asked for."""

    method: str
    options: dict[str, Any]

    @classmethod
    def of(cls, spec: JobSpec) -> StartChoice:
        """What the specification says; else the adapter to go on from, or the base model."""
        if spec.start is not None:
            return cls(str(spec.start.get("method")), dict(spec.start.get("options") or {}))
        return cls("zero" if spec.warm_start_from is None else "warm", {})

    @property
    def needs_model(self) -> bool:
        """Whether it looks at the user's examples through the base model."""
        return self.method in START_METHODS and START_METHODS[self.method].needs_calibration != "none"

    def filled(self, plan: TrainingPlan) -> dict[str, Any]:
        """The options, with what only the training knows: its learning rate and its number of steps.

        Raises `InvalidInput` for an unknown start or option.
        """
        if self.method not in START_METHODS:
            raise InvalidInput(f"unknown start {self.method!r}", param="init")
        known = START_METHODS[self.method].options
        told = {"learning_rate": plan.learning_rate, "total_steps": plan.total_steps}
        given = {name: value for name, value in self.options.items() if value is not None}
        return fill_options(
            f"start {self.method}", known, {name: told[name] for name in told if name in known} | given
        )


@dataclass(frozen=True)
class StartSources:
    """What there is to start from. examples: the user's own. adapter, with its basis: to go on from."""

    base: BaseModel
    examples: CalibrationSet
    adapter: Adapter | None = None
    adapter_basis: Basis | None = None


def make_start(
    choice: StartChoice,
    options: Mapping[str, Any],
    *,
    spec: JobSpec,
    basis: JobBasis,
    sources: StartSources,
    progress: Progress,
) -> Start:
    """R_0 in trained coordinates. Runs passes through the model if `choice.needs_model`."""
    request = StartRequest(
        basis=basis.basis,
        base=sources.base,
        calibration=sources.examples,
        step=own_step(choice, options, spec, basis),
        adapter=sources.adapter,
        adapter_basis=sources.adapter_basis,
        progress=progress,
    )
    return find_start(request, method=choice.method, **options)


def own_step(
    choice: StartChoice, options: Mapping[str, Any], spec: JobSpec, basis: JobBasis
) -> Tensor | None:
    """The step that was found with the basis, if it is the one that the start would find with a pass more."""
    method = basis.basis.manifest.method
    wanted, shared = _SAME_STEP.get(method, ("", ()))
    if basis.step is None or spec.calibration != OWN_DATA or choice.method != wanted:
        return None
    built_with = basis.basis.manifest.recipe.get("options", {})
    if any(built_with.get(name) != options.get(name) for name in shared):
        return None
    if options.get("normalise", "none") != _NORMALISE.get(method, options.get("normalise", "none")):
        return None
    return basis.step


def told(start: Start) -> str:
    """The start in a sentence for the job's owner."""
    notes = start.notes
    details = []
    if "eta" in notes:
        details.append(f"step size {notes['eta']:.4g}")
    losses = notes.get("losses")
    if losses:
        details.append(f"loss {losses['0']:.4f} -> {min(losses.values()):.4f}")
    if notes.get("relative_loss"):
        details.append(f"{notes['relative_loss']:.1%} lost in moving it to this basis")
    return f"Start {notes['method']}" + (f": {', '.join(details)}" if details else "")
