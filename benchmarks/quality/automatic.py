"""Whether the trainer's automatic learning rate would have been a good one, method by method."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.cases import CASES
from benchmarks.quality.claims import TOLERANCE
from benchmarks.quality.data import PERSONAL_EXAMPLES, is_personal
from benchmarks.quality.results import Results
from tessera.methods.forms import LORA_PRESETS
from trainer_worker.training.learning_rates import BasisKind, LoraKind, variant

#: Of a whole data set: as many as make no difference.
MANY_EXAMPLES = 1000
#: One step of the sweeps: 3e-3, 1e-2, 3e-2, …
GRID_STEP = 10 / 3


def automatic_rate(results: Results, data: str, case: str, rank: int) -> float | None:
    """What a job of this method and rank would get; None for what no job trains, or an unknown gain."""
    form, _, name = case.rpartition(":")
    num_examples = PERSONAL_EXAMPLES if is_personal(data) else MANY_EXAMPLES
    if form == "lora" and name in LORA_PRESETS:
        return LoraKind(name, rank).rate_for(num_examples)
    build: dict[str, Any] = results.build(data, case, rank) or {}
    gain = build.get("gain")
    if form or name not in CASES or CASES[name].change != "none" or gain is None:
        return None
    known = CASES[name]
    method = variant(known.method, {"options": known.options})
    return BasisKind(method, rank, gain, known.init).rate_for(num_examples)


def good_rates(results: Results, data: str, case: str, rank: int) -> tuple[list[float], bool]:
    """The rates whose loss is as good as the best; whether a larger one than all tried might be better."""
    losses = {rate: results.at(data, case, rank, rate).mean for rate in results.sweep(data, case, rank)}
    best = min(losses.values())
    good = sorted(rate for rate, loss in losses.items() if loss <= best + TOLERANCE)
    return good, good[-1] == max(losses)


def rates_lines(results: Results) -> list[str]:
    """In how many sweeps the automatic rate is within one step of a good one, and where it is not."""
    num_near, far = 0, []
    for data, rank in results.all_settings:
        for case in results.cases(data, rank):
            rate = automatic_rate(results, data, case, rank)
            if rate is None or len(results.sweep(data, case, rank)) < 2:
                continue
            good, is_open = good_rates(results, data, case, rank)
            if good[0] / GRID_STEP <= rate and (is_open or rate <= good[-1] * GRID_STEP):
                num_near += 1
            else:
                far.append(f"{case} at rank {rank} on {data} ({rate:.2g}; good: {good[0]:g} to {good[-1]:g})")
    if not num_near and not far:
        return []
    said = f"in {num_near} of {num_near + len(far)} sweeps"
    exceptions = f"; not for {', '.join(far)}" if far else ""
    return ["", f"The automatic learning rate is within one step of a good one {said}{exceptions}."]
