"""Questions to the records: the best of a sweep, the loss at one rate, a method's share of LoRA's gain."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.quality import cases, lora_runs
from benchmarks.quality.data import is_personal

Mode = Literal["small", "best"]


@dataclass(frozen=True)
class Loss:
    """The mean over seeds at one rate, and its standard deviation (None for one seed). is_edge: the rate is
    the smallest or largest of the sweep, so a wider one might find a better."""

    mean: float
    std: float | None
    rate: float
    num_seeds: int
    is_edge: bool = False

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.3f}"
        return f"{self.mean:.3f}{spread} at {self.rate:g}{' (edge)' if self.is_edge else ''}"


class Results:
    """All that is known of one benchmark. Records of the same run, from an earlier try, are counted once."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        runs: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.base: dict[str, float] = {}
        self.probes: list[dict[str, Any]] = []
        self._builds: dict[tuple[str, str, int], dict[str, Any]] = {}
        for record in records:
            if record["kind"] == "run":
                key = tuple(record[name] for name in ("data", "case", "rank", "seed", "rate"))
                runs[key] = record
            elif record["kind"] == "build":
                self._builds[record["data"], record["case"], record["rank"]] = record
            elif record["kind"] == "base":
                self.base[record["data"]] = record["loss"]
            elif record["kind"] == "probe":
                self.probes.append(record)
        self.runs = list(runs.values())
        self._sweeps: dict[tuple[str, str, int], dict[float, list[dict[str, Any]]]] = defaultdict(dict)
        for run in self.runs:
            sweep = self._sweeps[run["data"], run["case"], run["rank"]]
            sweep.setdefault(run["rate"], []).append(run)

    @property
    def all_settings(self) -> list[tuple[str, int]]:
        """(data set, rank) that anything was measured for, in the order of the records."""
        return list(dict.fromkeys((run["data"], run["rank"]) for run in self.runs))

    @property
    def settings(self) -> list[tuple[str, int]]:
        """Those with all examples, which the papers' claims are about."""
        return [(data, rank) for data, rank in self.all_settings if not is_personal(data)]

    @property
    def personal_settings(self) -> list[tuple[str, int]]:
        """Those with one user's few examples."""
        return [(data, rank) for data, rank in self.all_settings if is_personal(data)]

    @property
    def all_datasets(self) -> list[str]:
        return list(dict.fromkeys([*self.base, *(run["data"] for run in self.runs)]))

    @property
    def datasets(self) -> list[str]:
        """Those with all examples."""
        return [data for data in self.all_datasets if not is_personal(data)]

    def ranks(self, data: str) -> list[int]:
        return sorted({rank for name, rank in self.all_settings if name == data})

    def cases(self, data: str, rank: int) -> list[str]:
        return [case for name, case, r in self._sweeps if (name, r) == (data, rank)]

    def sweep(self, data: str, case: str, rank: int) -> dict[float, list[dict[str, Any]]]:
        """The runs of each rate."""
        return self._sweeps.get((data, case, rank), {})

    def loss(self, data: str, case: str, rank: int, mode: Mode = "best") -> Loss | None:
        """At the best rate by the mean over seeds, or at the common small rate; None if not measured."""
        rates = sorted(self.sweep(data, case, rank))
        if mode == "small":
            small = small_rate(case)
            return self.at(data, case, rank, small) if small in rates else None
        found = [self.at(data, case, rank, rate) for rate in rates]
        if not found:
            return None
        best = min(found, key=lambda loss: loss.mean)
        is_edge = len(rates) > 1 and best.rate in (rates[0], rates[-1])
        return Loss(best.mean, best.std, best.rate, best.num_seeds, is_edge)

    def at(self, data: str, case: str, rank: int, rate: float) -> Loss:
        """At one rate; infinite if a seed diverged there."""
        losses = [_number(run["loss"]) for run in self.sweep(data, case, rank)[rate]]
        std = statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else None
        return Loss(sum(losses) / len(losses), std, rate, len(losses))

    def share(self, data: str, case: str, rank: int) -> float | None:
        """Of what LoRA of the same rank improves on the base model."""
        base, lora, own = self.base.get(data), self.loss(data, "lora:lora", rank), self.loss(data, case, rank)
        if base is None or lora is None or own is None or not base > lora.mean:
            return None
        return (base - own.mean) / (base - lora.mean)

    def early_loss(self, data: str, case: str, rank: int, rate: float, share: float = 0.1) -> float | None:
        """The mean training loss of the first `share` of the steps, over seeds."""
        found = []
        for run in self.sweep(data, case, rank).get(rate, []):
            curve = run["train_curve"]
            points = [loss for step, loss in curve if step <= max(curve[0][0], share * curve[-1][0])]
            found.append(sum(map(_number, points)) / len(points))
        return sum(found) / len(found) if found else None

    def parameters(self, data: str, case: str, rank: int) -> int:
        sweep = self.sweep(data, case, rank)
        return int(next(iter(sweep.values()))[0]["parameters"])

    def build(self, data: str, case: str, rank: int) -> dict[str, Any] | None:
        """Seconds and peak bytes; a basis that needs no data is built once for all data sets."""
        own = self._builds.get((data, case, rank))
        others = (record for (_, name, r), record in self._builds.items() if (name, r) == (case, rank))
        return own or next(others, None)

    def probe(self, name: str, **where: Any) -> Sequence[dict[str, Any]]:
        """The rows of one probe whose fields are these."""
        return [
            row
            for row in self.probes
            if row["probe"] == name and all(row.get(key) == value for key, value in where.items())
        ]


def small_rate(case: str) -> float:
    """The rate at which this kind of training is compared untuned."""
    return lora_runs.SMALL_RATE if ":" in case else cases.SMALL_RATE


def _number(loss: float | None) -> float:
    return math.inf if loss is None else loss
