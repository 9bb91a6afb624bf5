"""The one way from a method to a basis: check everything, pass over the data group by group, factorise, record.

Knows no single method. All that can be refused is refused before the first pass over the data; a basis is
returned whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from adapter_core.base_model import BaseModel
from adapter_core.bases.calibration import CalibrationSet
from adapter_core.bases.collected import Counts, Needs, Statistics
from adapter_core.bases.decomposition import Decomposition, module_seed
from adapter_core.bases.gradients import collect
from adapter_core.bases.losses import check_fits
from adapter_core.bases.method import Method, ModuleData, ModuleFactors, Option, fill_options
from adapter_core.bases.targets import Target, find_targets, layer_groups
from adapter_core.basis import DTYPES, Basis, ModuleShape
from adapter_core.errors import InvalidInput

Progress = Callable[[int, int], None]

#: Statistics of one pass over the data. One layer of an 8B model needs 0.9 GB for its gradients and 1.9 GB with
#: LoRA-DA's factors; at least one layer is always taken, so this bounds memory for small models and time for large.
STATISTICS_BYTES = 2**30

#: Of every method: how singular vectors are found, and the scale s of s B' R' A', which under Adam multiplies the
#: learning rate (LoRAM proposition 1) and never reaches serving.
COMMON_OPTIONS = {
    "svd": Option("auto", "how singular vectors are found", choices=("auto", "exact", "randomised")),
    "scale": Option(1.0, "s in s B' R' A', as alpha / r of the papers: multiplies the learning rate", minimum=1e-12),
    "seed": Option(0, "of everything random in it"),
}
#: Of methods that read calibration data.
DATA_OPTIONS = {
    "num_examples": Option(0, "at most so many of the calibration examples, at random; 0 is all", minimum=0),
    "statistics_bytes": Option(STATISTICS_BYTES, "memory for statistics in one pass over the data", minimum=1),
}


@dataclass(frozen=True)
class BuiltBasis:
    """A basis, and the method's own first step from the same data, if it has one.

    step: [M, r, r] in trained coordinates, for a learning rate of one: `make_start` scales it.
    """

    basis: Basis
    step: Tensor | None


def build(
    base: BaseModel,
    method: Method,
    *,
    rank: int,
    target_modules: Sequence[str],
    calibration: CalibrationSet | None,
    dtype: str,
    progress: Progress | None,
    given: Mapping[str, Any],
) -> BuiltBasis:
    """Build a basis by `method`. Raises `InvalidInput`, `UnsupportedModel`."""
    if dtype not in DTYPES:
        raise InvalidInput(f"a basis is stored as {', '.join(DTYPES)}, not as {dtype}", param="dtype")
    options = fill_options(method.name, method.options, given)
    targets = find_targets(base.model, target_modules, rank)
    method.check(rank, options)
    needs = method.needs(rank, options)
    chosen = choose_calibration(base, method.name, needs, calibration, options, method.select)
    found: dict[ModuleShape, ModuleFactors] = {}
    for target, statistics in _passes(base, targets, needs, chosen, calibration, options):
        found[target.shape] = _factorise(method, target, statistics, rank, options)
        if progress is not None:
            progress(len(found), len(targets))
    recipe = _recipe(method, rank, target_modules, options, chosen, calibration, found)
    factors = {shape: (f.A, f.B * options["scale"]) for shape, f in found.items()}
    basis = method.assemble(
        model_id=base.model_id, method=method.name, factors=factors, recipe=recipe, dtype=dtype
    )
    return BuiltBasis(basis, _stack_steps(found.values(), options["scale"]))


def choose_calibration(
    base: BaseModel,
    owner: str,
    needs: Needs,
    calibration: CalibrationSet | None,
    options: Mapping[str, Any],
    select: Callable[[CalibrationSet, Mapping[str, Any]], CalibrationSet] | None = None,
) -> CalibrationSet | None:
    """The part of the data to pass over; None for a method that needs none.

    Raises `InvalidInput` if there is none although `owner` needs it, or if the model cannot read it.
    """
    if not needs.any:
        return None
    if calibration is None:
        kind = "labelled examples" if needs.labels else "text"
        raise InvalidInput(f"{owner} needs a calibration set of {kind}", param="calibration")
    usable = calibration.labelled() if needs.labels or needs.input_tokens == "label" else calibration
    check_fits(base, usable)
    if select is not None:
        return select(usable, options)
    return usable.take(options["num_examples"] or len(usable), seed=options["seed"])


def group_targets(targets: Sequence[Target], needs: Needs, limit_bytes: int) -> list[list[Target]]:
    """The targets in whole layers whose statistics fit the limit together (one layer always does)."""
    sizes = [needs.bytes_for(target) for target in targets]
    return [[targets[i] for i in group] for group in layer_groups(targets, sizes, limit_bytes)]


def _passes(
    base: BaseModel,
    targets: Sequence[Target],
    needs: Needs,
    chosen: CalibrationSet | None,
    population: CalibrationSet | None,
    options: Mapping[str, Any],
) -> Iterator[tuple[Target, Statistics]]:
    """Each target with its statistics; those of a group are dropped before the next group's pass."""
    if chosen is None:
        for target in targets:
            yield target, Statistics(Counts())
        return
    for group in group_targets(targets, needs, options["statistics_bytes"]):
        statistics = collect(base, group, chosen, needs, population=population)
        for index, target in enumerate(group):
            yield target, statistics[index]
            statistics[index] = Statistics(Counts())  # its memory goes when the caller is done with it


@torch.no_grad()
def _factorise(
    method: Method, target: Target, statistics: Statistics, rank: int, options: Mapping[str, Any]
) -> ModuleFactors:
    data = ModuleData(
        shape=target.shape,
        weight=target.weight,
        rank=rank,
        seed=module_seed(options["seed"], method.name, target.name, rank),
        statistics=statistics,
        decomposition=Decomposition(options["svd"]),
    )
    factors = method.factorise(data, options)
    step = None if factors.step is None else factors.step.double().cpu()
    return ModuleFactors(factors.A.cpu(), factors.B.cpu(), step, factors.notes)


def _stack_steps(factors: Iterator[ModuleFactors] | Any, scale: float) -> Tensor | None:
    steps = [f.step / scale for f in factors if f.step is not None]
    return torch.stack(steps).float() if steps else None


def _recipe(
    method: Method,
    rank: int,
    target_modules: Sequence[str],
    options: Mapping[str, Any],
    chosen: CalibrationSet | None,
    calibration: CalibrationSet | None,
    found: Mapping[ModuleShape, ModuleFactors],
) -> dict[str, Any]:
    """How the basis was built. notes: per name one number a module, in the manifest's order."""
    names = sorted({name for factors in found.values() for name in factors.notes})
    notes = {name: [factors.notes[name] for factors in found.values()] for name in names}
    recipe: dict[str, Any] = {
        "method": method.name,
        "rank": rank,
        "target_modules": list(target_modules),
        "options": dict(options),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "notes": notes,
    }
    if "relative_gap" in notes:
        recipe["min_relative_gap"] = min(notes["relative_gap"])
    if chosen is not None and calibration is not None:
        recipe["calibration"] = {
            "digest": calibration.digest,
            "num_examples": len(chosen),
            "num_tokens": chosen.num_tokens,
            "num_label_tokens": chosen.num_label_tokens,
            "drawn_from_examples": len(calibration),
        }
    return recipe
