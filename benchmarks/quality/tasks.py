"""A list of work in the order of its worth, done by one process or several until it is done or time is up.

Every process goes through the same list and claims what nobody has claimed, by creating a file. A piece of
work is begun only if it fits into what time is left, by its estimate and by how much longer than theirs
earlier pieces took; its records are written as it yields them. Of a piece that is partly known, from another
run or another list, only the rest is done.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.cases import CASES
from benchmarks.quality.core_runs import Sweep, build_case, train_case
from benchmarks.quality.costs import estimate_s
from benchmarks.quality.data import DataSet, mean_token_loss
from benchmarks.quality.lora_runs import RATES as LORA_RATES
from benchmarks.quality.lora_runs import rates_of, train_presets
from benchmarks.quality.peers import PeerMissing, train_peer
from benchmarks.quality.probes import precision, recall, retention, samples
from benchmarks.quality.records import RecordFile, RunRecord, read_records
from benchmarks.quality.settings import Settings
from benchmarks.quality.work import Task, remaining
from tessera.errors import TesseraError
from tessera.methods.forms import LORA_PRESETS
from tessera.model.base_model import BaseModel

#: A piece of work of a kind that was never done yet is begun with at least so much time left.
UNKNOWN_S = 45.0
#: The folder of the files that say what somebody has begun.
CLAIMS = "claims"


class Worker:
    """One process's share of the work."""

    def __init__(
        self, base: BaseModel, data: dict[str, DataSet], settings: Settings, out: Path, *, index: int = 0
    ) -> None:
        self.base, self.data, self.settings, self.out, self.index = base, data, settings, out, index
        self._records = RecordFile(out / f"records-{index}.jsonl")
        self._slowness: dict[str, list[float]] = {}
        self._claims = out / CLAIMS
        self._claims.mkdir(parents=True, exist_ok=True)

    def run(self, tasks: Sequence[Task], *, deadline: float) -> None:
        """Until nothing is left that fits. deadline: seconds since the epoch."""
        waiting = waiting_tasks(tasks, self.out, self.settings)
        again: list[Task] = []
        for task in waiting:
            if self._fits(task, deadline) and self._claim(task) and self._lacked_memory(task):
                self._unclaim(task)  # others were using it; for whoever gets there again
                again.append(task)
        for task in again:
            if self._fits(task, deadline) and self._claim(task):
                self._lacked_memory(task)
        self._records.close()

    def _lacked_memory(self, task: Task) -> bool:
        """Do it; whether it failed for want of the device's memory, which may be there later."""
        started = time.perf_counter()
        try:
            runs = self._work(task)
        except torch.OutOfMemoryError as error:
            self._say(f"{task.name}: {str(error).splitlines()[0]}")
            return True
        except (TesseraError, PeerMissing) as error:
            self._say(f"{task.name}: left out: {error}")
            return False
        except Exception:  # one method's failure must not cost the others' results
            self._say(f"{task.name}: failed\n{traceback.format_exc()}")
            return False
        finally:
            release_memory()
        seconds = time.perf_counter() - started
        self._slowness.setdefault(task.kind, []).append(seconds / estimate_s(task))
        record = {"digest": task.digest, "name": task.name, "seconds": round(seconds, 2)}
        record["estimate_s"] = round(estimate_s(task), 1)
        self._records.add("task", record)
        self._say(f"{task.name}: {_summary(runs)} ({len(runs)} runs, {seconds:.1f} s)")
        return False

    def _work(self, task: Task) -> list[RunRecord]:
        runs = []
        for record in perform(task, self.base, self.data, self.settings):
            if isinstance(record, RunRecord):
                runs.append(record)
                self._records.add("run", record)
            elif isinstance(record, dict):
                self._records.add(record.pop("kind"), record)
            else:
                self._records.add("build", record)
        return runs

    def _fits(self, task: Task, deadline: float) -> bool:
        left = deadline - time.time()
        known = self._slowness.get(task.kind)
        return left > (max(known[-3:]) * estimate_s(task) if known else UNKNOWN_S)

    def _claim(self, task: Task) -> bool:
        try:
            (self._claims / task.digest).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _unclaim(self, task: Task) -> None:
        (self._claims / task.digest).unlink(missing_ok=True)

    def _say(self, text: str) -> None:
        sys.stdout.write(f"[{self.index}] {text}\n")
        sys.stdout.flush()


def waiting_tasks(tasks: Sequence[Task], out: Path, settings: Settings) -> list[Task]:
    """What the records of a folder leave to be done."""
    done, known = set(), set()
    for record in read_records(out):
        if record["kind"] == "task":
            done.add(record["digest"])
        elif record["kind"] == "run":
            known.add(tuple(record[name] for name in ("data", "case", "rank", "seed", "rate")))

    def rates_of_case(case: str) -> Sequence[float]:
        form, _, name = case.rpartition(":")
        if not form:
            return settings.rates or CASES[name].rates
        return settings.lora_rates or (rates_of(LORA_PRESETS[name]) if form == "lora" else LORA_RATES)

    left = (remaining(task, known, rates_of_case) for task in tasks if task.digest not in done)
    return [task for task in left if task is not None]


def perform(task: Task, base: BaseModel, data: dict[str, DataSet], settings: Settings) -> Iterator[Any]:
    """The records of one piece of work, as they come."""
    sets = [data[name] for name in task.data]
    first = sets[0]
    if task.kind == "base":
        for item in sets:
            loss = mean_token_loss(base, item.data.valid, token_budget=settings.token_budget)
            yield {"kind": "base", "data": item.name, "loss": loss}
    elif task.kind == "core":
        yield from _perform_core(task, base, sets, settings)
    elif task.kind == "lora":
        rates = task.rates or settings.lora_rates or None
        yield from train_presets(base, task.cases, task.rank, first, settings, seeds=task.seeds, rates=rates)
    elif task.kind == "peft":
        rates = task.rates or settings.lora_rates or LORA_RATES
        for name in task.cases:
            yield from train_peer(base, name, task.rank, first, settings, seeds=task.seeds, rates=rates)
    else:
        yield from ({"kind": "probe", **row} for row in _probe(task, base, first, settings))


def _perform_core(task: Task, base: BaseModel, sets: Sequence[DataSet], settings: Settings) -> Iterator[Any]:
    """One case. A basis that needs no data serves all data sets, in one trainer."""
    case = CASES[task.cases[0]]
    rates = task.rates or settings.rates or case.rates
    shared = [sets] if not case.needs_data else [[item] for item in sets]
    for group in shared:
        for seeds in [[seed] for seed in task.seeds] if case.is_random else [task.seeds]:
            built = build_case(
                base, case, task.rank, group[0], settings, seed=seeds[0] if case.is_random else 0
            )
            yield built.record
            yield from train_case(base, case.name, built, Sweep(group, seeds, rates), settings)


def _probe(task: Task, base: BaseModel, data: DataSet, settings: Settings) -> list[dict[str, Any]]:
    if task.kind == "retention":
        return retention(base, data, settings)
    if task.kind == "samples":
        return samples(base, data, task.rank, settings)
    if task.kind == "recall":
        return recall(base, data, task.rank, (task.rates or LORA_RATES)[-1], settings)
    return precision(base, CASES[task.cases[0]], task.rank, data, settings)


def release_memory() -> None:
    """What a finished piece of work has left, back to the device, which other processes share."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _summary(runs: Sequence[RunRecord]) -> str:
    """The best run of each case."""
    best: dict[tuple[str, str], RunRecord] = {}
    for run in runs:
        key = (run.data, run.case)
        if run.loss is not None and (key not in best or run.loss < (best[key].loss or 0)):
            best[key] = run
    return (
        ", ".join(f"{run.data} {run.case} {run.loss:.3f} at {run.rate:g}" for run in best.values()) or "done"
    )
