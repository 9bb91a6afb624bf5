"""What a piece of work is, and what is left of it when some of its records are there already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

Kind = Literal["base", "core", "lora", "peft", "retention", "samples", "recall", "precision"]
#: The form's prefix of a case's name in the records.
PREFIXES = {"core": "", "lora": "lora:", "peft": "peft:"}
#: Data set, case, rank, seed and rate of a run.
RunName = tuple[str, str, int, int, float]


@dataclass(frozen=True)
class Task:
    """cases: names without the form. data: data sets; the LoRA forms, peers and data-aware bases take one.

    rates: None for the cases' own.
    """

    kind: Kind
    data: tuple[str, ...]
    cases: tuple[str, ...] = ()
    rank: int = 0
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        rank = f" r{self.rank}" if self.rank else ""
        return f"{self.kind} {'+'.join(self.cases)}{rank} {'+'.join(self.data)}".replace("  ", " ")

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def remaining(
    task: Task, known: Collection[RunName], rates_of_case: Callable[[str], Sequence[float]]
) -> Task | None:
    """The part of a task whose runs are not all known yet; None if nothing is left. Probes have no parts.

    rates_of_case: the sweep of a case, by its name in the records, where the task does not say.
    """
    if task.kind not in PREFIXES:
        return task
    prefix = PREFIXES[task.kind]
    missing = [
        (data, case, seed)
        for data in task.data
        for case in task.cases
        for seed in task.seeds
        if any(
            (data, prefix + case, task.rank, seed, rate) not in known
            for rate in task.rates or rates_of_case(prefix + case)
        )
    ]
    if not missing:
        return None
    return replace(
        task,
        data=tuple(dict.fromkeys(data for data, _, _ in missing)),
        cases=tuple(dict.fromkeys(case for _, case, _ in missing)),
        seeds=tuple(sorted({seed for _, _, seed in missing})),
    )
