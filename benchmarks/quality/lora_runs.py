"""The LoRA forms: several presets, rates and seeds in the same passes through the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from benchmarks.quality.core_runs import drive, make_record
from benchmarks.quality.data import DataSet
from benchmarks.quality.records import BuildRecord, RunRecord
from benchmarks.quality.settings import BuildMeter, Settings
from tessera.methods.bases import METHODS
from tessera.methods.forms import LORA_PRESETS, LoraPreset
from tessera.model.base_model import BaseModel
from trainer_worker.training.lora.factors import LoraFactors, initial_factors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer

#: The rate at which LoRA forms are compared untuned.
SMALL_RATE = 1e-4
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
#: Where only B learns, or from factors of 1/√γ, the best rates are higher; LoRA+'s B has 16 times the rate.
FROZEN_RATES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
PLUS_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
#: Trained numbers at once, to bound memory: about 20 bytes each.
MAX_NUMBERS = 150_000_000


def rates_of(preset: LoraPreset) -> tuple[float, ...]:
    if preset.b_rate > 1:
        return PLUS_RATES
    return RATES if preset.trains_A and not preset.name.startswith("lora_da") else FROZEN_RATES


def build_factors(
    base: BaseModel, preset: LoraPreset, rank: int, data: DataSet, settings: Settings, *, seeds: Sequence[int]
) -> tuple[list[LoraFactors], BuildRecord]:
    """The initial factors for each seed: built once where only the weights or the data decide them."""
    options = {} if preset.method is None else settings.options(METHODS[preset.method])
    found: list[LoraFactors] = []
    with BuildMeter() as meter:
        for seed in seeds:
            if found and preset.method is not None and not _is_random(preset):
                found.append(dataclasses.replace(found[0], seed=seed))
                continue
            found.append(
                initial_factors(base, preset, rank=rank, calibration=data.calibration, seed=seed, **options)
            )
    record = BuildRecord(data.name, f"lora:{preset.name}", rank, meter.seconds, meter.peak_bytes)
    return found, record


def _is_random(preset: LoraPreset) -> bool:
    return preset.method == "random" or preset.name in ("loram_orthogonal", "loram_gaussian")


def train_presets(
    base: BaseModel,
    presets: Sequence[str],
    rank: int,
    data: DataSet,
    settings: Settings,
    *,
    seeds: Sequence[int],
    rates: Sequence[float] | None,
) -> Iterator[BuildRecord | RunRecord]:
    """Builds and trains; presets that subtract, or that have a local rule, go together."""
    for names in _groups(presets):
        runs: list[LoraRun] = []
        where = {}
        for name in names:
            preset = LORA_PRESETS[name]
            factors, record = build_factors(base, preset, rank, data, settings, seeds=seeds)
            yield record
            for start in factors:
                for rate in rates or rates_of(preset):
                    plan = settings.plan(data, rate=rate, seed=start.seed)
                    run_id = f"{name}/{start.seed}/{rate:g}"
                    runs.append(LoraRun(run_id, data.data, plan, start))
                    where[run_id] = (data.name, start.seed, rate)
        size = 2 * runs[0].layout.width
        for part in _parts(runs, max(1, MAX_NUMBERS // size)):
            yield from _train(base, part, where, settings)


def _train(
    base: BaseModel, runs: Sequence[LoraRun], where: dict[str, tuple[str, int, float]], settings: Settings
) -> Iterator[RunRecord]:
    is_online = runs[0].factors.preset.online is not None
    # A local rule learns once per pass, so a step of such runs must be one pass.
    budget = 2**31 if is_online else settings.token_budget
    minimum = budget if is_online or base.device.type != "cpu" else 0
    trainer = LoraTrainer(base, runs, token_budget=budget, min_tokens=minimum)
    updates = drive(trainer.step, runs, settings)
    for run in runs:
        case, parameters = f"lora:{run.factors.preset.name}", run.factors.num_trained
        yield make_record(case, run.factors.rank, parameters, where[run.run_id], updates[run.run_id], run)


def _groups(presets: Sequence[str]) -> list[list[str]]:
    """Presets that can share passes at no cost to each other."""
    groups: dict[tuple[bool, bool, bool], list[str]] = {}
    for name in presets:
        preset = LORA_PRESETS[name]
        key = (preset.online is not None, preset.is_subtracted, preset.trains_A)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _parts(runs: Sequence[LoraRun], size: int) -> Iterator[Sequence[LoraRun]]:
    for first in range(0, len(runs), size):
        yield runs[first : first + size]
