"""All runs that are resident in this worker, whatever their basis. Plain and synchronous, for one thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapter_core.base_model import BaseModel
from adapter_core.basis import Basis
from trainer_worker import checkpoint
from trainer_worker.run import RunUpdate, TrainRun
from trainer_worker.train import TokenCounts, Trainer

#: Trainers kept although nobody trains in their basis: building one again costs copies of A and B.
MAX_IDLE_TRAINERS = 1


@dataclass
class Tick:
    """What one step of everybody brought. failures: by run, what ended the step of its trainer."""

    updates: list[RunUpdate] = field(default_factory=list)
    failures: dict[str, Exception] = field(default_factory=dict)
    tokens: TokenCounts = field(default_factory=TokenCounts)


class TrainerPool:
    """One trainer per basis; at most `max_runs` runs over all."""

    def __init__(self, base: BaseModel, *, max_runs: int, token_budget: int) -> None:
        self._base, self._max_runs, self._token_budget = base, max_runs, token_budget
        self._trainers: dict[str, Trainer] = {}

    @property
    def num_runs(self) -> int:
        return sum(len(trainer.runs) for trainer in self._trainers.values())

    def join(self, run: TrainRun, basis: Basis) -> None:
        """Make a run resident. Raises `BasisMismatch`, `UnsupportedModel`."""
        if basis.basis_id not in self._trainers:
            self._drop_idle()
            self._trainers[basis.basis_id] = Trainer(
                self._base, basis, max_runs=self._max_runs, token_budget=self._token_budget
            )
        self._trainers[basis.basis_id].join(run)

    def leave(self, run_id: str) -> TrainRun | None:
        """Take a run out, with its tensors; None if it is not resident."""
        found = (trainer.leave(run_id) for trainer in self._trainers.values())
        return next((run for run in found if run is not None), None)

    def snapshot(self, run_id: str) -> bytes | None:
        """The checkpoint of a resident run; None if it is not resident."""
        for trainer in self._trainers.values():
            for run in trainer.runs:
                if run.run_id == run_id:
                    return checkpoint.to_bytes(run)
        return None

    def tick(self) -> Tick:
        """One step of every run. A trainer whose step fails is dropped with its runs; the others go on."""
        tick = Tick()
        for basis_id, trainer in list(self._trainers.items()):
            if not trainer.runs:
                continue
            before = trainer.tokens
            try:
                tick.updates += trainer.step()
            except Exception as error:
                tick.failures |= {run.run_id: error for run in trainer.runs}
                del self._trainers[basis_id]
            tick.tokens += trainer.tokens - before
        return tick

    def _drop_idle(self) -> None:
        idle = [basis_id for basis_id, trainer in self._trainers.items() if not trainer.runs]
        for basis_id in idle[: max(0, len(idle) - MAX_IDLE_TRAINERS)]:
            del self._trainers[basis_id]
