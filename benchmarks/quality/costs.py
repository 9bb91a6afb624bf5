"""How long a piece of work takes, and how long a list of them: from the seconds of an earlier run.

The figures are of one H100 80GB shared by four processes, the small model (24.8 M parameters) and 1,600
examples, the tasks of benchmarks/results/quality-h100-small: a trainer of 10 r x r runs took 37 to 42 s, of
30 runs 66 to 79 s; LoRA forms 38 s for 10 runs, 88 s for 30; four that subtract 147 s for 40; PEFT 16 to 18 s
a run; LoRA-DA's basis 20 s more than a gradient's. What was never measured there is marked.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from benchmarks.quality.cases import CASES
from benchmarks.quality.data import is_personal
from benchmarks.quality.lora_runs import RATES as LORA_RATES
from benchmarks.quality.lora_runs import rates_of
from benchmarks.quality.work import Task
from tessera.methods.forms import LORA_PRESETS

#: Of one trainer: what it takes whatever is in it, and each run.
TRAINER_S, CORE_RUN_S, LORA_RUN_S = 22.0, 1.75, 2.2
#: A subtracted product is another pass; a local rule learns module by module and run by run (a guess).
SUBTRACTED_FACTOR, ONLINE_FACTOR = 1.4, 3.0
PEER_RUN_S = 17.0
#: Bases and factors from data, by method; the others take next to nothing.
BUILD_S = {"lora_da": 22.0, "eva": 17.0, "corda": 20.0, "lolora": 20.0, "lora_sb": 4.0, "gradient_svd": 4.0}
#: Probes; samples and recall are guesses from what they build and train.
PROBE_S = {"base": 2.0, "retention": 4.0, "samples": 45.0, "recall": 60.0, "precision": 62.0}
#: 35 steps of 8 instead of 200 of 16.
PERSONAL_FACTOR = 0.15


def estimate_s(task: Task) -> float:
    """Seconds of one task on that machine."""
    if task.kind in PROBE_S:
        return PROBE_S[task.kind]
    share = PERSONAL_FACTOR if is_personal(task.data[0]) else 1.0
    if task.kind == "core":
        return _core_s(task, share)
    if task.kind == "peft":
        num_runs = len(task.cases) * len(task.seeds) * len(task.rates or LORA_RATES)
        return share * PEER_RUN_S * num_runs + _builds_s(task.cases) * len(task.seeds)
    seconds = _builds_s([LORA_PRESETS[name].method or "" for name in task.cases])
    groups = {(LORA_PRESETS[n].online is None, LORA_PRESETS[n].is_subtracted) for n in task.cases}
    for name in task.cases:
        preset = LORA_PRESETS[name]
        factor = ONLINE_FACTOR if preset.online else SUBTRACTED_FACTOR if preset.is_subtracted else 1.0
        num_runs = len(task.seeds) * len(task.rates or rates_of(preset))
        seconds += share * factor * LORA_RUN_S * num_runs
    return seconds + share * TRAINER_S * len(groups)


def _core_s(task: Task, share: float) -> float:
    case = CASES[task.cases[0]]
    num_trainers = len(task.seeds) if case.is_random else 1
    num_trainers *= len(task.data) if case.needs_data else 1
    num_runs = len(task.data) * len(task.seeds) * len(task.rates or case.rates)
    return num_trainers * (share * TRAINER_S + BUILD_S.get(case.method, 0.0)) + share * CORE_RUN_S * num_runs


def _builds_s(methods: Sequence[str]) -> float:
    return sum(BUILD_S.get(method, 0.0) for method in methods)


def finished_after_s(tasks: Sequence[Task], workers: int) -> list[float]:
    """When each task is done if so many processes go through the list, each taking what comes next."""
    free = [0.0] * workers
    ends = []
    for task in tasks:
        end = heapq.heappop(free) + estimate_s(task)
        heapq.heappush(free, end)
        ends.append(end)
    return ends
