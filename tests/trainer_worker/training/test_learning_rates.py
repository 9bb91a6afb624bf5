"""The automatic learning rates: the rule, the records that chose it, and a rate for every combination."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tessera.errors import InvalidInput
from tessera.methods.bases import METHODS, build_basis
from tessera.methods.forms import LORA_PRESETS
from tessera.methods.init import INIT_METHODS, PRESETS
from tessera.model.base_model import BaseModel
from trainer_worker.training.learning_rates import (
    DEFAULT_PEAK_STEP,
    GRADIENT_BASES,
    INIT_FACTORS,
    LORA_RATES,
    PEAK_STEPS,
    RATED_RANK,
    BasisKind,
    LoraKind,
    variant,
)
from trainer_worker.training.plan import make_plan

RECORDS = Path(__file__).parents[3] / "benchmarks/results/quality-h100-small/records.jsonl.gz"
#: One step of the recorded sweeps: 3e-3, 1e-2, 3e-2, 1e-1, 3e-1.
GRID_STEP = 10 / 3
#: A loss this close to the best counts as equal: the noise between seeds, and the benchmark's tolerance.
TOLERANCE = 0.01
#: For each case of the benchmark its row in the table, its initialization, and the preconditioner's gain at
#: ranks 4 and 16 in the measured model (1 where both factors are orthonormal).
CASES = {
    "lora_xs": ("lora_xs", "zero", {4: 4.315, 16: 3.489}),
    "lora_xs_orth": ("lora_xs", "zero", {}),
    "lora_xs_bottom": ("lora_xs/bottom", "zero", {4: 0.3198}),
    "xs_random": ("lora_xs/random", "zero", {4: 4.122}),
    "random": ("random", "zero", {}),
    "gradient_svd": ("gradient_svd", "zero", {}),
    "lora_sb": ("lora_sb", "sb_step", {}),
    "lora_sb_zero": ("lora_sb", "zero", {}),
    "lora_da": ("lora_da", "da_step", {}),
}
Sweep = dict[float, list[float]]


@cache
def sweeps() -> dict[tuple[str, int, str], Sweep]:
    """The losses at each rate, by (case, rank, data set)."""
    found: dict[tuple[str, int, str], Sweep] = defaultdict(lambda: defaultdict(list))
    with gzip.open(RECORDS, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["kind"] == "run":
                loss = float("inf") if record["loss"] is None else record["loss"]
                found[record["case"], record["rank"], record["data"]][record["rate"]].append(loss)
    return dict(found)


def good_rates(sweep: Sweep) -> tuple[list[float], bool]:
    """The rates with a mean loss as good as the best, and whether a larger rate might be even better."""
    means = {rate: sum(losses) / len(losses) for rate, losses in sweep.items()}
    best = min(means.values())
    good = sorted(rate for rate, mean in means.items() if mean <= best + TOLERANCE)
    return good, good[-1] == max(means)


def is_near(rate: float, sweep: Sweep) -> bool:
    """Whether a rate is within one grid step of a good one, or above the largest if that one is good."""
    good, is_open = good_rates(sweep)
    return good[0] / GRID_STEP <= rate and (is_open or rate <= good[-1] * GRID_STEP)


def test_the_rule_is_within_one_grid_step_of_every_recorded_best() -> None:
    checked = set()
    for (case, rank, data), sweep in sweeps().items():
        form, _, name = case.rpartition(":")
        if form == "peft":
            continue
        if form == "lora":
            rate = LoraKind(name, rank).learning_rate
        else:
            method, start, gains = CASES[name]
            rate = BasisKind(method, rank, gains.get(rank, 1.0), start).learning_rate
        assert is_near(rate, sweep), f"{case} at rank {rank} on {data}: {rate:.2g}, good {good_rates(sweep)}"
        checked.add(case)
    assert set(CASES) <= checked
    assert len(checked) == 19


def test_nearness_is_a_real_condition() -> None:
    """The check would fail for a tenth and for ten times the rule's rate."""
    sweep = sweeps()["lora_xs", 16, "jargon"]
    rate = BasisKind("lora_xs", 16, 3.489).learning_rate
    assert is_near(rate, sweep)
    assert not is_near(rate / 10, sweep)
    assert not is_near(rate * 10, sweep)


def test_every_method_with_every_start_has_a_rate() -> None:
    for method, start, rank in itertools.product(METHODS, INIT_METHODS, (1, 2, 4, 64)):
        rate = BasisKind(method, rank, start=start).learning_rate
        assert rate * rank / RATED_RANK == pytest.approx(PEAK_STEPS.get(method, DEFAULT_PEAK_STEP))
        made = make_plan({}, None, num_examples=400, kind=BasisKind(method, rank, start=start), seed=0)
        assert made.learning_rate == rate
    stated = {name.partition("/")[0] for name in PEAK_STEPS}
    assert stated <= set(METHODS)
    unmeasured = set(METHODS) - stated
    assert unmeasured <= {"olora", "corda", "eva", "lolora", "population"}, "say what a new method's step is"
    assert set(INIT_FACTORS) <= set(INIT_METHODS)
    for preset in PRESETS.values():
        assert preset.basis in METHODS
        assert preset.init in INIT_METHODS


def test_few_examples_take_smaller_steps_where_the_basis_knows_a_gradient() -> None:
    for method in METHODS:
        kind = BasisKind(method, 16)
        rates = [
            make_plan({}, None, num_examples=count, kind=kind, seed=0).learning_rate
            for count in (50, 250, 5000)
        ]
        assert rates[1] == rates[2] == kind.learning_rate
        assert rates[0] == pytest.approx(kind.learning_rate * (0.5 if method in GRADIENT_BASES else 1.0))
    assert set(METHODS) >= GRADIENT_BASES


def test_every_lora_form_has_a_rate() -> None:
    for form, preset in LORA_PRESETS.items():
        rate = LoraKind(form, RATED_RANK).learning_rate
        assert 1e-4 <= rate <= 3e-2
        assert make_plan({}, None, num_examples=40, kind=LoraKind(form, 16), seed=0).learning_rate == rate
        relative = preset.scale(RATED_RANK) / preset.scale(64)
        assert LoraKind(form, 64).learning_rate == pytest.approx(rate / 2 * relative)
    assert set(LORA_RATES) <= set(LORA_PRESETS)
    with pytest.raises(InvalidInput, match="unknown LoRA form"):
        _ = LoraKind("dora", 16).learning_rate


def test_the_rate_falls_with_the_rank_and_the_gain() -> None:
    rate = BasisKind("lora_xs", rank=16).learning_rate
    assert BasisKind("lora_xs", rank=4).learning_rate == pytest.approx(4 * rate)
    assert BasisKind("lora_xs", rank=16, gain=5.0).learning_rate == pytest.approx(rate / 5)
    new = BasisKind("something_new", rank=32, start="something_else").learning_rate
    assert new == pytest.approx(DEFAULT_PEAK_STEP / 2)


def test_variants_have_their_own_step(small: BaseModel) -> None:
    """At the same gain, bottom and random vectors respond less to a step than the top ones."""
    bottom = BasisKind.of(build_basis(small, rank=2, vectors="bottom", with_sigma=False))
    top = BasisKind.of(build_basis(small, rank=2, with_sigma=False), start="noise")
    assert (bottom.method, top.method, top.start) == ("lora_xs/bottom", "lora_xs", "noise")
    assert bottom.learning_rate == pytest.approx(2 * top.learning_rate)
    assert variant("milora", {"options": {"vectors": "bottom"}}) == "milora"
    assert variant("peft", {"options": "unknown"}) == "peft"
    assert variant("peft", {}) == "peft"


def test_a_scale_in_the_basis_changes_the_rate_and_not_the_step(small: BaseModel) -> None:
    """Like LoRA's alpha / r, the scale multiplies R', but the stored core moves as far as before."""
    plain = build_basis(small, rank=4, with_sigma=False)
    assert BasisKind.of(plain).gain == pytest.approx(1.0)
    scaled = dataclasses.replace(plain, P_out=plain.P_out * 7)
    assert BasisKind.of(scaled).learning_rate * 7 == pytest.approx(BasisKind.of(plain).learning_rate)


def test_the_rates_of_the_bundled_model_are_among_those_that_were_measured(tiny: BaseModel) -> None:
    """Its losses are flat from 2e-3 to 8e-3 with singular values, and from 8e-3 to 16e-3 without."""
    for with_sigma, low, high in ((True, 2e-3, 8e-3), (False, 8e-3, 16.1e-3)):
        kind = BasisKind.of(build_basis(tiny, rank=16, with_sigma=with_sigma))
        assert low <= kind.learning_rate <= high
