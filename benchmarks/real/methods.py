"""The methods that are compared, by name: `lora_xs`, any preset of a basis, `lora`, any LoRA form, `full`.

Knows how a basis and the first core come about, and no training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.population.score import matmul_precision
from benchmarks.quality.settings import BuildMeter
from tessera.errors import InvalidInput
from tessera.formats.basis import Basis
from tessera.methods.bases import METHODS, CalibrationSet, Population, build_basis_and_step
from tessera.methods.forms import LORA_PRESETS
from tessera.methods.init import INIT_METHODS, compute_init
from tessera.methods.init.method import InitInputs
from tessera.methods.presets import PRESETS, Preset
from tessera.model.base_model import BaseModel
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.learning_rates import BasisKind
from trainer_worker.training.plan import TrainingPlan

FULL = "full"
#: What a job trains that names neither a basis nor an initialization.
_DEFAULT = {"lora_xs": PRESETS["lora_xs_zero"]}


@dataclass(frozen=True)
class Method:
    """A method of the comparison."""

    name: str
    #: core (R in a frozen basis), lora (A and B) or full (all weights).
    form: str
    #: The preset of a basis and an initialization; None for the other forms.
    preset: Preset | None = None

    @classmethod
    def of(cls, name: str) -> Method:
        """Return the method of this name. `lora:NAME` is a LoRA form whose name a preset of a basis has too.

        Raises `InvalidInput` for an unknown name.
        """
        if name == FULL:
            return cls(name, FULL)
        preset = _DEFAULT.get(name) or PRESETS.get(name)
        if preset is not None:
            return cls(name, "core", preset)
        form = name.removeprefix("lora:")
        if form in LORA_PRESETS:
            return cls(name, "lora")
        known = [FULL, *PRESETS, *(f"lora:{form}" if form in PRESETS else form for form in LORA_PRESETS)]
        raise InvalidInput(f"unknown method {name!r}; known: {', '.join(known)}", param="methods")

    @property
    def lora_preset(self) -> str:
        return self.name.removeprefix("lora:")

    @property
    def is_shared(self) -> bool:
        """Whether one basis serves all tasks. The others are built from each task's own examples."""
        return self.form == "core" and (self._reads == "none" or self.needs_population)

    @property
    def needs_population(self) -> bool:
        return self.preset is not None and self.preset.basis == "population"

    @property
    def _reads(self) -> str:
        assert self.preset is not None
        return METHODS[self.preset.basis].needs_calibration


@dataclass(frozen=True)
class Built:
    """A basis, and the core that a run of a plan begins with."""

    basis: Basis
    kind: BasisKind
    #: The stored core for training data and a plan, [M, r, r].
    start: Callable[[TrainingData, TrainingPlan], Tensor]
    seconds: float


def build(
    base: BaseModel,
    method: Method,
    rank: int,
    examples: CalibrationSet | None,
    *,
    token_budget: int,
    is_fast: bool,
    passes: float | None = None,
) -> Built:
    """Build the basis of `method` from `examples`: of the task, of other users, or None for weights alone.

    passes: over the population's examples; None takes the method's default. Raises `InvalidInput`.
    """
    preset = method.preset
    assert preset is not None
    options = dict(preset.basis_options)
    is_learned = isinstance(examples, Population)
    if is_learned:
        options |= {"batch_tokens": token_budget} | ({} if passes is None else {"passes": passes})
    with BuildMeter() as meter, matmul_precision(is_fast=is_fast and is_learned):
        built = build_basis_and_step(base, method=preset.basis, rank=rank, calibration=examples, **options)
    basis = built.basis

    found: dict[tuple[str, int, float], Tensor] = {}

    def start(data: TrainingData, plan: TrainingPlan) -> Tensor:
        key = data.digest, data.num_train, plan.learning_rate if preset.caller_sets else 0.0
        if key not in found:
            found[key] = compute(data, plan)
        return found[key]

    def compute(data: TrainingData, plan: TrainingPlan) -> Tensor:
        known = INIT_METHODS[preset.init]
        planned = {"learning_rate": plan.learning_rate, "total_steps": plan.total_steps}
        request = InitInputs(
            basis=basis,
            base=base,
            calibration=CalibrationSet.from_encoded(data.train)
            if known.needs_calibration != "none"
            else None,
            step=built.step if preset.own_basis else None,
        )
        options: dict[str, Any] = {name: planned[name] for name in planned if name in known.options}
        options |= preset.init_options
        R0 = compute_init(request, method=preset.init, **options).R0
        return basis.fold(R0.double()).float()

    return Built(basis, BasisKind.of(basis, start=preset.init), start, meter.seconds)
