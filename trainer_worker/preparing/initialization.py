"""The choice of a job's initialization, of its options and of the first step that it uses.

This module knows no Redis. The initializations themselves are in `tessera/methods/init`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.init import INIT_METHODS, Initialization
from tessera.methods.options import fill_options
from tessera.queue.records import OWN_DATA, JobSpec
from trainer_worker.training.plan import TrainingPlan

if TYPE_CHECKING:  # a benchmark plans runs without a store
    from trainer_worker.preparing.basis_source import JobBasis

#: The initialization that begins with the base model: R_0 = 0.
BASE_MODEL = "zero"

#: The initialization that computes the same step as a method does while it builds its basis, by method,
#: with the options that must agree for that.
_SAME_STEP: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "lora_sb": ("sb_step", ("soft_sign", "noise")),
    "lora_da": (
        "da_step",
        ("mode", "form", "output_factor", "damping", "damping_mode", "normalise", "use_fisher"),
    ),
    "lora_one": ("gradient", ()),
    "gradient_svd": ("gradient", ()),
}
#: The value of "normalise" with which "gradient" computes the step of the method.
_NORMALISE = {"lora_one": "spectral", "gradient_svd": "none"}


@dataclass(frozen=True)
class InitChoice:
    """An initialization by name, with the options of the job's specification."""

    method: str
    options: dict[str, Any]

    @classmethod
    def of(cls, spec: JobSpec) -> InitChoice:
        """Return the specified initialization, or the one that continues an adapter or the base model."""
        if spec.start is not None:
            return cls(str(spec.start.get("method")), dict(spec.start.get("options") or {}))
        return cls(BASE_MODEL if spec.warm_start_from is None else "warm", {})

    @property
    def needs_model(self) -> bool:
        """Whether the initialization runs the user's examples through the base model."""
        return self.method in INIT_METHODS and INIT_METHODS[self.method].needs_calibration != "none"

    def fill_options(self, plan: TrainingPlan) -> dict[str, Any]:
        """Return all options. The learning rate and the number of steps come from the plan unless specified.

        Raises `InvalidInput` for an unknown initialization or option.
        """
        if self.method not in INIT_METHODS:
            raise InvalidInput(f"unknown initialization {self.method!r}", param="init")
        known = INIT_METHODS[self.method].options
        planned = {"learning_rate": plan.learning_rate, "total_steps": plan.total_steps}
        given = {name: value for name, value in self.options.items() if value is not None}
        return fill_options(
            f"initialization {self.method}",
            known,
            {name: planned[name] for name in planned if name in known} | given,
        )

    def step_of(self, found: JobBasis, spec: JobSpec, options: Mapping[str, Any]) -> Tensor | None:
        """Return the step computed with the basis, if this initialization would compute the same one."""
        method = found.basis.manifest.method
        same_init, shared_options = _SAME_STEP.get(method, ("", ()))
        if found.step is None or spec.calibration != OWN_DATA or self.method != same_init:
            return None
        built_with = found.basis.manifest.recipe.get("options", {})
        known = INIT_METHODS[same_init].options
        for name in shared_options:  # a basis that is older than an option was built with its default
            if built_with.get(name, known[name].default) != options.get(name):
                return None
        if options.get("noise") and built_with.get("seed") != options.get("seed"):
            return None
        normalise = options.get("normalise", "none")
        return found.step if normalise == _NORMALISE.get(method, normalise) else None


def init_message(start: Initialization) -> str:
    """Return the initialization in a sentence for the job's owner."""
    notes = start.notes
    details = []
    if "eta" in notes:
        details.append(f"step size {notes['eta']:.4g}")
    losses = notes.get("losses")
    if losses:
        details.append(f"loss {losses['0']:.4f} -> {min(losses.values()):.4f}")
    if notes.get("relative_loss"):
        details.append(f"{notes['relative_loss']:.1%} lost in moving it to this basis")
    return f"Initialization {notes['method']}" + (f": {', '.join(details)}" if details else "")
