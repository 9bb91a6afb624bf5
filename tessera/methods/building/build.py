"""Building a basis by any method: check, pass over the data by groups, factorise, record the recipe.

This file knows no particular method. Everything that can be refused is refused before the first pass over the
data, and a basis is returned whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from tessera.errors import InvalidInput
from tessera.formats.basis import DTYPES, Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.methods.building.calibration import CalibrationSet
from tessera.methods.building.collected import Counts, Needs, Statistics
from tessera.methods.building.decomposition import Decomposition, module_seed
from tessera.methods.building.gradients import collect
from tessera.methods.building.losses import check_fits
from tessera.methods.building.memory_bound import MemoryBound
from tessera.methods.building.method import Method, ModuleData, ModuleFactors
from tessera.methods.building.targets import Target, find_targets, layer_groups, module_groups
from tessera.methods.options import Options, fill_options
from tessera.model.base_model import BaseModel
from tessera.model.rank_pattern import module_ranks


@dataclass(frozen=True)
class BuildRequest:
    """The arguments of a build, whatever the method."""

    rank: int
    #: Patterns of module names.
    target_modules: Sequence[str]
    calibration: CalibrationSet | None
    #: The dtype in which the factors are stored, a name of `DTYPES`.
    dtype: str
    #: Called as progress(done, total); counts modules, and the steps of a method that then goes on learning.
    progress: Callable[[int, int], None] | None
    #: The method's options as the caller gave them, not yet checked.
    options: Mapping[str, Any]
    #: The ranks of modules that have another (`rank_pattern.py`); None: none has.
    rank_pattern: Mapping[str, int] | None = None


@dataclass(frozen=True)
class BuiltBasis:
    """A basis, and the method's own first step from the same data, if it has one."""

    basis: Basis
    #: [M, r, r] in trained coordinates, for a learning rate of one; `make_init` scales it.
    step: Tensor | None


def build(base: BaseModel, method: Method, request: BuildRequest) -> BuiltBasis:
    """Build a basis with `method`. Raises `InvalidInput` or `UnsupportedModel`."""
    if request.dtype not in DTYPES:
        raise InvalidInput(f"a basis is stored as {', '.join(DTYPES)}, not as {request.dtype}", param="dtype")
    options = fill_options(method.name, method.options, request.options)
    targets = find_targets(base.model, request.target_modules, request.rank, request.rank_pattern)
    ranks = module_ranks([target.name for target in targets], request.rank, request.rank_pattern)
    rank = max(ranks)
    if request.rank_pattern and not (method.assemble is make_basis and method.refinement is None):
        raise InvalidInput(f"{method.name} gives all modules one rank", param="rank_pattern")
    for one in sorted(set(ranks)):
        method.check(one, options)
    needs = method.needs(rank, options)
    usable = usable_calibration(base, method.name, needs, request.calibration)
    check_size(usable, rank)
    chosen = None if usable is None else method.select(usable, options)
    check_size(chosen, rank)
    refinement = None
    if method.refinement is not None:
        refinement = method.refinement(usable, rank, options)
    total = len(targets) + (0 if refinement is None else refinement.num_steps)
    report = request.progress or (lambda done, total: None)
    found: dict[ModuleShape, ModuleFactors] = {}
    reading = Reading(chosen, usable, rank, options.get("statistics_bytes", 0))
    own_rank = dict(zip((target.name for target in targets), ranks, strict=True))
    for target, statistics in passes(base, targets, needs, reading):
        factors_of = _factorise(method, target, statistics, own_rank[target.name], options)
        found[target.shape] = _padded(factors_of, rank)
        report(len(found), total)
    recipe = _recipe(method, request, options, chosen, found)
    factors = {shape: (f.A, f.B * options["scale"]) for shape, f in found.items()}
    basis = method.assemble(
        model_id=base.model_id,
        method=method.name,
        factors=factors,
        recipe=recipe,
        dtype=request.dtype if refinement is None else "float32",
        **({"ranks": ranks} if request.rank_pattern else {}),
    )
    if refinement is not None:
        done = len(targets)
        refined = refinement.refine(
            base, basis, dtype=request.dtype, progress=lambda step: report(done + step, total)
        )
        return BuiltBasis(refined, None)
    steps = [f.step / options["scale"] for f in found.values() if f.step is not None]
    return BuiltBasis(basis, torch.stack(steps).float() if steps else None)


def usable_calibration(
    base: BaseModel, owner: str, needs: Needs, calibration: CalibrationSet | None
) -> CalibrationSet | None:
    """Return the examples that a method or initialization can use, or None if it needs none.

    owner: its name, for messages. Raises `InvalidInput` if a needed set is missing, or if the model cannot
    read it.
    """
    if not needs.any:
        return None
    if calibration is None:
        kind = "labelled examples" if needs.labels else "text"
        raise InvalidInput(f"{owner} needs a calibration set of {kind}", param="calibration")
    usable = calibration.labelled() if needs.labels or needs.input_tokens == "label" else calibration
    check_fits(base, usable)
    return usable


def check_size(chosen: CalibrationSet | None, rank: int) -> None:
    """Raise `InvalidInput` for at most `rank` tokens, because their statistics cannot have that rank."""
    if chosen is not None and chosen.num_tokens <= rank:
        raise InvalidInput(
            f"the calibration set holds {chosen.num_tokens} tokens, too few for rank {rank}",
            param="calibration",
            code="calibration_too_small",
        )


@dataclass(frozen=True)
class Reading:
    """The data that the passes read, and the memory that they may use."""

    #: The examples that are read; None: none are needed.
    chosen: CalibrationSet | None
    #: The set that `chosen` was drawn from.
    population: CalibrationSet | None
    #: The rank of the LoRA whose training bounds the memory.
    rank: int
    #: A limit on the statistics of one pass instead of that bound; 0: the bound decides.
    limit_bytes: int = 0


def passes(
    base: BaseModel, targets: Sequence[Target], needs: Needs, reading: Reading
) -> Iterator[tuple[Target, Statistics]]:
    """Yield each target with its statistics, in one pass over `chosen` per group of layers that fits.

    A group's statistics are dropped, module by module, before the next pass. If gradients are collected, a
    layer that is too large for the bound is split into several groups. Otherwise groups are whole layers,
    because the modules of a layer share the rules that learn from inputs.
    """
    if reading.chosen is None:
        for target in targets:
            yield target, Statistics(Counts())
        return
    sizes = [needs.bytes_for(target) for target in targets]
    bound = MemoryBound(targets, reading.rank, reading.chosen)
    limit_bytes = reading.limit_bytes or bound.statistics_bytes(sum(sizes))
    cut = module_groups if needs.gradient and not reading.limit_bytes else layer_groups
    for group in cut(targets, sizes, limit_bytes):
        members = [targets[index] for index in group]
        statistics = collect(base, members, reading.chosen, needs, population=reading.population, bound=bound)
        for index in group:
            found = statistics.pop(0)
            found.working_bytes = bound.working_bytes(sum(sizes[index : group.stop]))
            yield targets[index], found
            del found


@torch.no_grad()
def _factorise(
    method: Method, target: Target, statistics: Statistics, rank: int, options: Options
) -> ModuleFactors:
    data = ModuleData(
        shape=target.shape,
        weight=target.weight,
        rank=rank,
        seed=module_seed(options["seed"], method.name, target.name, rank),
        statistics=statistics,
        decomposition=Decomposition(options["svd"], statistics.working_bytes),
    )
    factors = method.factorise(data, options)
    step = None if factors.step is None else factors.step.double().cpu()
    # Copy, because a view of r vectors would keep the memory of all vectors of the decomposition. Statistics
    # that were summed in float32 carry no more than float32.
    dtype = factors.A.dtype if statistics.working_bytes is None else torch.float32
    A, B = (x.to("cpu", dtype, copy=True) for x in (factors.A, factors.B))
    return ModuleFactors(A, B, step, factors.notes)


def _padded(factors: ModuleFactors, rank: int) -> ModuleFactors:
    """Return the factors with zero vectors up to `rank`."""
    more = rank - len(factors.A)
    if not more:
        return factors
    step = None if factors.step is None else F.pad(factors.step, (0, more, 0, more))
    return ModuleFactors(F.pad(factors.A, (0, 0, 0, more)), F.pad(factors.B, (0, more)), step, factors.notes)


def _recipe(
    method: Method,
    request: BuildRequest,
    options: Options,
    chosen: CalibrationSet | None,
    found: Mapping[ModuleShape, ModuleFactors],
) -> dict[str, Any]:
    """Return how the basis was built. Each note is a list with one number per module, in manifest order."""
    names = sorted({name for factors in found.values() for name in factors.notes})
    notes = {name: [factors.notes[name] for factors in found.values()] for name in names}
    recipe: dict[str, Any] = {
        "method": method.name,
        "rank": request.rank,
        "target_modules": list(request.target_modules),
        **({"rank_pattern": dict(request.rank_pattern)} if request.rank_pattern else {}),
        "options": dict(options),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "notes": notes,
    }
    if "relative_gap" in notes:
        recipe["min_relative_gap"] = min(notes["relative_gap"])
    if chosen is not None and request.calibration is not None:
        recipe["calibration"] = {
            "digest": request.calibration.digest,
            "num_examples": len(chosen),
            "num_tokens": chosen.num_tokens,
            "num_label_tokens": chosen.num_label_tokens,
            "drawn_from_examples": len(request.calibration),
        }
    return recipe
