"""The tasks of the population benchmark: one way to get a basis (or LoRA), one rank, all newcomers.

Each task yields its records as they are measured. This file knows no processes and no report.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.population.score import Job, base_losses, drive, matmul_precision, train_cores, train_lora
from benchmarks.population.users import Cast
from benchmarks.quality.settings import BuildMeter
from tessera.chat.chat_format import EncodedExample
from tessera.formats.basis import Basis
from tessera.methods.bases import CalibrationSet, Population, build_basis
from tessera.methods.init import make_init
from tessera.model.base_model import BaseModel
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.learning_rates import BasisKind
from trainer_worker.training.lora.factors import LoraFactors, initial_factors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer
from trainer_worker.training.plan import TrainingPlan

#: The LoRA for a head start: passes over the population, batch, rate.
POOLED_EPOCHS, POOLED_BATCH, POOLED_RATE = 3, 32, 1e-3
#: Calibration examples of the bases that read one gradient.
CALIBRATION = 1000


@dataclass(frozen=True)
class Task:
    """kind: lora (with the base model's losses), pooled_lora (LoRA going on from one trained on the whole
    population), basis. data: what a basis is built from, "" (weights only), "pooled" (one pile), "users",
    "own" (of each newcomer). options: of the method, and `num_taught`: so many users only."""

    name: str
    kind: str
    rank: int
    method: str = ""
    data: str = ""
    cast: str = "main"
    options: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[str, ...] = ("zero",)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Setting:
    """What is the same for all tasks.

    rates: of steps on the stored R at rank 16; they are taken times 16 / r, and by the preconditioner's gain.
    """

    base: BaseModel
    casts: Mapping[str, Cast]
    token_budget: int
    is_fast: bool
    rates: Sequence[float]
    lora_rates: Sequence[float]

    def jobs(self, cast: Cast, rates: Sequence[float], starts: Sequence[str] = ("zero",)) -> list[Job]:
        """The longest first, so that a cut loses least."""
        return [
            Job(newcomer, num, seed, rate, start)
            for num, seeds in sorted(cast.seeds.items(), reverse=True)
            for seed in seeds
            for newcomer in cast.newcomers
            for start in starts
            for rate in rates
        ]

    @property
    def passes(self) -> dict[str, Any]:
        return {"token_budget": self.token_budget, "is_fast": self.is_fast}


Record = dict[str, Any]


def perform(task: Task, setting: Setting) -> Iterator[Record]:
    """The records of one task: kind "base", "build" or "run"."""
    cast = setting.casts[task.cast]
    work = {"lora": _lora, "pooled_lora": _pooled_lora, "basis": _basis}[task.kind]
    for record in work(task, setting, cast):
        yield {"cast": cast.name, "method": task.name, "rank": task.rank, **record}


def _lora(task: Task, setting: Setting, cast: Cast) -> Iterator[Record]:
    nothing = build_basis(setting.base, method="random", rank=1)
    losses = base_losses(setting.base, nothing, cast.newcomers, token_budget=setting.token_budget)
    for newcomer, loss in zip(cast.newcomers, losses, strict=True):
        yield {"kind": "base", "newcomer": newcomer.name, "loss": loss}
    yield from _lora_runs(setting, cast, initial_factors(setting.base, task.method or "lora", rank=task.rank))


def _pooled_lora(task: Task, setting: Setting, cast: Cast) -> Iterator[Record]:
    """What the population is worth to LoRA: newcomers go on from a LoRA trained on all its users."""
    base, union = setting.base, cast.population
    factors = initial_factors(base, "lora", rank=task.rank)
    data = TrainingData(_encoded(union), (), digest="")
    steps = POOLED_EPOCHS * -(-len(union) // POOLED_BATCH)
    plan = TrainingPlan(POOLED_EPOCHS, POOLED_BATCH, steps, POOLED_RATE, 0, steps // 20, steps, None)
    run = LoraRun("pooled", data, plan, factors)
    minimum = 0 if base.device.type == "cpu" else setting.token_budget
    trainer = LoraTrainer(base, [run], token_budget=setting.token_budget, min_tokens=minimum)
    with BuildMeter() as meter:
        list(drive(trainer.step, [run], is_fast=setting.is_fast))
    yield {"kind": "build", "seconds": meter.seconds, "num_parameters": factors.num_trained}
    A, B = zip(*((A.cpu().clone(), B.cpu().clone()) for A, B in run.trained(run.R)), strict=True)
    yield from _lora_runs(setting, cast, dataclasses.replace(factors, A=A, B=B))


def _lora_runs(setting: Setting, cast: Cast, factors: LoraFactors) -> Iterator[Record]:
    jobs = setting.jobs(cast, setting.lora_rates)
    for record in train_lora(setting.base, factors, jobs, **setting.passes):
        yield {"kind": "run", "num_parameters": factors.num_trained, **record}


def _basis(task: Task, setting: Setting, cast: Cast) -> Iterator[Record]:
    if task.data == "own":
        yield from _own(task, setting, cast)
        return
    basis, record = _build(task, setting, _calibration(task, cast))
    yield record
    yield from _core_runs(setting, basis, setting.jobs(cast, _rates(setting, basis), task.starts))


def _own(task: Task, setting: Setting, cast: Cast) -> Iterator[Record]:
    """A basis of each newcomer's own examples: what a shared basis has to be compared with."""
    for newcomer in cast.newcomers:
        for num, seeds in cast.seeds.items():
            for seed in seeds:
                alone = dataclasses.replace(cast, newcomers=[newcomer], seeds={num: [seed]})
                own = CalibrationSet.from_encoded(setting.jobs(alone, [0.0])[0].data().train)
                basis, _ = _build(task, setting, own)
                yield from _core_runs(
                    setting, basis, setting.jobs(alone, _rates(setting, basis), task.starts)
                )


def _calibration(task: Task, cast: Cast) -> CalibrationSet | None:
    if not task.data:
        return None
    if task.data == "pooled":
        return cast.population.take(CALIBRATION, seed=0)
    num = task.options.get("num_taught", len(cast.population.sizes))
    users = cast.population.users
    return Population.of([users[i * len(users) // num] for i in range(num)])


def _build(task: Task, setting: Setting, data: CalibrationSet | None) -> tuple[Basis, Record]:
    options = {name: value for name, value in task.options.items() if name != "num_taught"}
    if task.data == "users":
        options["batch_tokens"] = setting.token_budget
    is_fast = setting.is_fast and task.data == "users"  # the others take one pass, and decompose its result
    with BuildMeter() as meter, matmul_precision(is_fast=is_fast):
        basis = build_basis(setting.base, method=task.method, rank=task.rank, calibration=data, **options)
    record = {"kind": "build", "seconds": meter.seconds, "peak_bytes": meter.peak_bytes}
    return basis, {**record, **basis.manifest.recipe.get("population", {})}


def _core_runs(setting: Setting, basis: Basis, jobs: Sequence[Job]) -> Iterator[Record]:
    start = _starts(setting.base, basis)
    for record in train_cores(setting.base, basis, jobs, start, **setting.passes):
        yield {"kind": "run", "num_parameters": basis.num_modules * basis.rank**2, **record}


def _starts(base: BaseModel, basis: Basis) -> Callable[[Job], Tensor | None]:
    """The stored core that a job begins with. gradient: a step down the newcomer's own gradient from zero."""
    found: dict[tuple[str, int, int], Tensor] = {}

    def start(job: Job) -> Tensor | None:
        if job.start == "zero":
            return None
        if job.start == "population":
            return basis.start
        key = (job.newcomer.name, job.num_examples, job.seed)
        if key not in found:
            own = CalibrationSet.from_encoded(job.data().train)
            core = make_init(basis, method=job.start, base=base, calibration=own)
            found[key] = basis.fold(core.double()).float()
        return found[key]

    return start


def _rates(setting: Setting, basis: Basis) -> list[float]:
    return [rate * 16 / basis.rank / BasisKind.of(basis).gain for rate in setting.rates]


def _encoded(calibration: CalibrationSet) -> tuple[EncodedExample, ...]:
    return tuple(EncodedExample(list(ids), list(mask)) for ids, mask in calibration.examples)
