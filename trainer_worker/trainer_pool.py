"""All runs that are resident in this worker, whatever their basis or form. Synchronous, for one thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.model.base_model import BaseModel
from trainer_worker.training import checkpoint
from trainer_worker.training.run import RunTrainer, RunUpdate, TokenCounts, TrainRun

#: Trainers that are kept without a run: making one again costs copies of its A and B.
MAX_IDLE_TRAINERS = 1


@dataclass
class Tick:
    """The outcome of one step of all runs."""

    updates: list[RunUpdate] = field(default_factory=list)
    #: By run, the error that ended the step of its trainer.
    failures: dict[str, Exception] = field(default_factory=dict)
    tokens: TokenCounts = field(default_factory=TokenCounts)


class TrainerPool:
    """One trainer per basis, with at most `max_runs` runs, and one for each run of a LoRA form."""

    def __init__(self, base: BaseModel, *, max_runs: int, token_budget: int) -> None:
        self._base, self._max_runs, self._token_budget = base, max_runs, token_budget
        self._trainers: list[RunTrainer] = []

    @property
    def num_runs(self) -> int:
        return sum(len(trainer.runs) for trainer in self._trainers)

    def join(self, run: TrainRun) -> None:
        """Make a run resident. Raises `BasisMismatch`, `UnsupportedModel`."""
        if any(trainer.try_join(run) for trainer in self._trainers):
            return
        self._drop_idle()
        self._trainers.append(
            run.make_trainer(self._base, max_runs=self._max_runs, token_budget=self._token_budget)
        )

    def leave(self, run_id: str) -> TrainRun | None:
        """Take a run out, with its tensors; None if it is not resident."""
        for trainer in self._trainers:
            run = trainer.leave(run_id)
            if run is not None:
                if not trainer.is_reusable:
                    self._trainers.remove(trainer)
                return run
        return None

    def snapshot(self, run_id: str) -> bytes | None:
        """The checkpoint of a resident run; None if it is not resident."""
        for trainer in self._trainers:
            for run in trainer.runs:
                if run.run_id == run_id:
                    return checkpoint.to_bytes(run)
        return None

    def tick(self) -> Tick:
        """Make one step of every run. A trainer whose step fails is dropped with its runs."""
        tick = Tick()
        for trainer in list(self._trainers):
            if all(run.is_finished for run in trainer.runs):
                continue
            before = trainer.tokens
            try:
                tick.updates += trainer.step()
            except Exception as error:
                tick.failures |= {run.run_id: error for run in trainer.runs}
                self._trainers.remove(trainer)
            tick.tokens += trainer.tokens - before
        return tick

    def _drop_idle(self) -> None:
        idle = [trainer for trainer in self._trainers if not trainer.runs]
        for trainer in idle[: max(0, len(idle) - MAX_IDLE_TRAINERS)]:
            self._trainers.remove(trainer)
