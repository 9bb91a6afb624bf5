"""The r x r form: one basis, and every rate, seed and data set trained in it as users of one trainer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.cases import Case
from benchmarks.quality.data import DataSet
from benchmarks.quality.records import BuildRecord, RunRecord, shortened
from benchmarks.quality.settings import BuildMeter, Settings
from tessera.formats.basis import Basis, make_basis
from tessera.methods.bases import METHODS, BuiltBasis, build_basis_and_step
from tessera.methods.building.decomposition import orthonormal_columns
from tessera.methods.init import make_init
from tessera.model.base_model import BaseModel
from trainer_worker.training.learning_rates import BasisKind
from trainer_worker.training.run import RunUpdate, TrainRun
from trainer_worker.training.trainer import CoreRun, Trainer


@dataclass(frozen=True)
class BuiltCase:
    """A basis, and the stored core with which training begins, [M, r, r], for each learning rate."""

    basis: Basis
    start: Callable[[float], Tensor | None]
    record: BuildRecord


def build_case(
    base: BaseModel, case: Case, rank: int, data: DataSet, settings: Settings, *, seed: int = 0
) -> BuiltCase:
    """The case's basis on the examples of `data`. Raises `InvalidInput`."""
    with BuildMeter() as meter:
        built = build_basis_and_step(
            base,
            method=case.method,
            rank=rank,
            target_modules=case.target_modules,
            calibration=data.calibration if case.needs_data else None,
            **{**settings.options(METHODS[case.method]), **case.options, "seed": seed},
        )
        if case.change == "noise":
            built = BuiltBasis(half_noise(built.basis, seed=seed), None)
        start = _start(base, case, built, data)
        basis = built.basis
        if case.change == "absorb":
            basis, start = absorbed(built.basis, start(0.0))
    notes = {name: statistics.median(all_) for name, all_ in built.basis.manifest.recipe["notes"].items()}
    gain = BasisKind.of(basis).gain
    record = BuildRecord(data.name, case.name, rank, meter.seconds, meter.peak_bytes, gain, notes)
    return BuiltCase(basis, start, record)


def _start(base: BaseModel, case: Case, built: BuiltBasis, data: DataSet) -> Callable[[float], Tensor | None]:
    if case.init == "zero":
        return lambda rate: None

    def make(**options: object) -> Tensor:
        R0 = make_init(
            built.basis, method=case.init, base=base, calibration=data.calibration, step=built.step,
            **{**case.init_options, **options},
        )  # fmt: skip
        return built.basis.fold(R0.double()).float()

    if case.lr_init:
        return lambda rate: make(eta_init="lr", learning_rate=rate)
    fixed = make()
    return lambda rate: fixed


def half_noise(basis: Basis, *, seed: int) -> Basis:
    """Every direction half itself and half random, orthonormal again (LoRA-SB, table 4: "ΔW + noise")."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for shape, A, B in zip(basis.manifest.modules, basis.A, basis.B, strict=True):
        noisy = []
        for X in (A.double().T, B.double()):
            noise = torch.randn(X.shape, generator=generator, dtype=torch.float64)
            noisy.append(orthonormal_columns(X + noise / noise.norm(dim=0)))
        factors[shape] = (noisy[0].T, noisy[1])
    recipe = {**basis.manifest.recipe, "noise": 0.5}
    return make_basis(model_id=basis.manifest.model_id, method="sb_noise", factors=factors, recipe=recipe)


def absorbed(basis: Basis, core: Tensor | None) -> tuple[Basis, Callable[[float], Tensor | None]]:
    """B' = B R_0, R'_0 = I: the same weights at first, another preconditioner (LoRA-SB, eqs 11-12)."""
    assert core is not None
    factors = {
        shape: (A, B @ R)
        for shape, A, B, R in zip(basis.manifest.modules, basis.A, basis.B, core, strict=True)
    }
    recipe = {**basis.manifest.recipe, "absorbed": True}
    other = make_basis(model_id=basis.manifest.model_id, method="sb_usv", factors=factors, recipe=recipe)
    identity = torch.eye(basis.rank).expand(basis.num_modules, -1, -1)
    start = other.fold(identity.double()).float()
    return other, lambda rate: start


@dataclass(frozen=True)
class Sweep:
    """Which runs one basis gets."""

    data: Sequence[DataSet]
    seeds: Sequence[int]
    rates: Sequence[float]


def train_case(
    base: BaseModel, case_name: str, built: BuiltCase, sweep: Sweep, settings: Settings
) -> list[RunRecord]:
    """All runs of a sweep, together."""
    basis, runs, where = built.basis, [], {}
    for data in sweep.data:
        for seed in sweep.seeds:
            for rate in sweep.rates:
                plan = settings.plan(data, rate=rate, seed=seed)
                run_id = f"{data.name}/{seed}/{rate:g}"
                runs.append(CoreRun(run_id, data.data, plan, basis, start=built.start(rate)))
                where[run_id] = (data.name, seed, rate)
    trainer = Trainer(base, basis, max_runs=len(runs), token_budget=settings.token_budget)
    for run in runs:
        trainer.join(run)
    updates = drive(trainer.step, runs, settings)
    parameters = basis.num_modules * basis.rank**2
    return [
        make_record(case_name, basis.rank, parameters, where[run.run_id], updates[run.run_id], run)
        for run in runs
    ]


def drive(
    step: Callable[[], list[RunUpdate]], runs: Sequence[TrainRun], settings: Settings
) -> dict[str, list[RunUpdate]]:
    """Step until all runs have ended; the last validation of each is in full float32. Updates by run."""
    updates: dict[str, list[RunUpdate]] = {run.run_id: [] for run in runs}
    while not all(run.is_finished for run in runs):
        is_last = any(not run.is_finished and run.progress.step >= run.plan.total_steps for run in runs)
        with settings.training_precision(exact=is_last):
            for update in step():
                updates[update.run_id].append(update)
    return updates


def make_record(
    case: str,
    rank: int,
    parameters: int,
    where: tuple[str, int, float],
    updates: Sequence[RunUpdate],
    run: TrainRun,
) -> RunRecord:
    """where: data set, seed, rate."""
    data, seed, rate = where
    # An update's validation was before its step; the last one makes no step.
    valid = []
    for index, update in enumerate(updates):
        if update.valid_loss is not None:
            valid.append([float(updates[index - 1].step if index else 0), update.valid_loss])
    losses = [update.train_loss for update in updates if update.train_loss is not None]
    has_ended = run.progress.finish_reason == "completed"
    return RunRecord(
        data=data,
        case=case,
        rank=rank,
        seed=seed,
        rate=rate,
        loss=run.progress.valid_loss if has_ended else None,
        parameters=parameters,
        train_curve=shortened(losses),
        valid_curve=valid,
    )
