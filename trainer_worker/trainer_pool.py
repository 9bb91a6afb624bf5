"""All runs that are resident in this worker, whatever their basis. Plain and synchronous, for one thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from trainer_worker.training import checkpoint
from trainer_worker.training.data import GPU_MIN_TOKENS
from trainer_worker.training.lora.form import LoraRun, LoraTrainer
from trainer_worker.training.run import RunUpdate, TrainRun
from trainer_worker.training.train import TokenCounts, Trainer

#: Trainers kept although nobody trains in their basis: building one again costs copies of A and B.
MAX_IDLE_TRAINERS = 1


@dataclass
class Tick:
    """What one step of everybody brought. failures: by run, what ended the step of its trainer."""

    updates: list[RunUpdate] = field(default_factory=list)
    failures: dict[str, Exception] = field(default_factory=dict)
    tokens: TokenCounts = field(default_factory=TokenCounts)


class TrainerPool:
    """One trainer per basis, at most `max_runs` runs in each; one for each run of a LoRA form, which trains
    alone: its A and B are as large as a basis, so sharing a pass would save little."""

    def __init__(self, base: BaseModel, *, max_runs: int, token_budget: int) -> None:
        self._base, self._max_runs, self._token_budget = base, max_runs, token_budget
        self._trainers: dict[str, Trainer] = {}
        self._lora_trainers: dict[str, LoraTrainer] = {}  # by run

    @property
    def num_runs(self) -> int:
        return sum(len(trainer.runs) for trainer in self._trainers.values()) + len(self._lora_trainers)

    def join(self, run: TrainRun, basis: Basis | None) -> None:
        """Make a run resident. basis: None for a LoRA form. Raises `BasisMismatch`, `UnsupportedModel`."""
        if isinstance(run, LoraRun):
            min_tokens = 0 if self._base.device.type == "cpu" else GPU_MIN_TOKENS
            if run.factors.preset.online is not None:  # a local rule learns from every pass: as few as can be
                min_tokens = self._token_budget
            self._lora_trainers[run.run_id] = LoraTrainer(
                self._base, [run], token_budget=self._token_budget, min_tokens=min_tokens
            )
            return
        assert basis is not None
        if basis.basis_id not in self._trainers:
            self._drop_idle()
            self._trainers[basis.basis_id] = Trainer(
                self._base, basis, max_runs=self._max_runs, token_budget=self._token_budget
            )
        self._trainers[basis.basis_id].join(run)

    def leave(self, run_id: str) -> TrainRun | None:
        """Take a run out, with its tensors; None if it is not resident."""
        alone = self._lora_trainers.pop(run_id, None)
        if alone is not None:
            alone.release()
            return alone.runs[0]
        found = (trainer.leave(run_id) for trainer in self._trainers.values())
        return next((run for run in found if run is not None), None)

    def snapshot(self, run_id: str) -> bytes | None:
        """The checkpoint of a resident run; None if it is not resident."""
        trainers: list[Trainer | LoraTrainer] = [*self._trainers.values(), *self._lora_trainers.values()]
        for trainer in trainers:
            for run in trainer.runs:
                if run.run_id == run_id:
                    return checkpoint.to_bytes(run)
        return None

    def tick(self) -> Tick:
        """One step of every run. A trainer whose step fails is dropped with its runs; the others go on."""
        tick = Tick()
        everybody: list[tuple[dict[str, Any], str]] = [(self._trainers, name) for name in self._trainers]
        everybody += [(self._lora_trainers, name) for name in self._lora_trainers]
        for trainers, name in everybody:
            trainer: Trainer | LoraTrainer = trainers[name]
            if all(run.is_finished for run in trainer.runs):
                continue
            before = trainer.tokens
            try:
                tick.updates += trainer.step()
            except Exception as error:
                tick.failures |= {run.run_id: error for run in trainer.runs}
                del trainers[name]
            tick.tokens += trainer.tokens - before
        return tick

    def _drop_idle(self) -> None:
        idle = [basis_id for basis_id, trainer in self._trainers.items() if not trainer.runs]
        for basis_id in idle[: max(0, len(idle) - MAX_IDLE_TRAINERS)]:
            del self._trainers[basis_id]
