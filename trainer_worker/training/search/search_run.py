"""A job that trains several candidates at once and publishes the best: a run with many members.

    first third    all candidates
    second third   the better half
    last third     the best one

The candidates have the same data order and make their steps together. With folds, a candidate is a run on all
examples, which is published if the candidate wins, and one run per fold, which is judged on the examples of
its fold; so every example is trained on, and every judgement is on examples that the judged run has not seen.
Knows no Redis and no clock.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tessera.formats.basis import Basis
from tessera.methods.scaling import NO_SCALING, Scaling
from tessera.queue.hyperparameters import LAST
from trainer_worker.data.splits import assign_folds
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.run import EvaluatedState, Progress, RunUpdate
from trainer_worker.training.search.candidate import Candidate, CandidateRun, rank_candidates
from trainer_worker.training.search.ladder import Ladder
from trainer_worker.training.trainer import CoreRun


@dataclass(frozen=True)
class Start:
    """What a search begins with and falls back on."""

    #: The stored core to begin with, [M, r, r]; None begins with the base model.
    core: Tensor | None = None
    #: Whether training begins with the base model, so that the first evaluation is the base model's.
    is_base: bool = True
    #: Whether the core is an adapter of the owner, which is better kept than replaced by the base model.
    is_adapter: bool = False


#: Training begins with the base model.
FROM_BASE = Start()


class SearchRun(CoreRun):
    """Several candidates in one basis, of which one is published."""

    def __init__(
        self,
        run_id: str,
        data: TrainingData,
        plan: TrainingPlan,
        basis: Basis,
        ladder: Ladder,
        *,
        start: Start = FROM_BASE,
        scaling: Scaling = NO_SCALING,
    ) -> None:
        """data: with folds all examples, otherwise with the held-out ones that judge.

        plan: its learning rate is the one that `ladder.multiples` multiply. Raises `InvalidInput` if the core
        of `start` has another shape.
        """
        super().__init__(run_id, data, plan, basis, start=start.core, scaling=scaling)
        self._scaling = scaling
        self.ladder, self._start = ladder, start
        self._fold_data = _split_into_folds(data, ladder.num_folds)
        self.candidates = [self._make_candidate(multiple) for multiple in ladder.multiples]
        self.leader = self.candidates[0]
        #: Measures the base model on the judging examples, where training does not begin with it.
        self._base_run = None if start.is_base else self._make_base_run()

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.ladder}"

    @property
    def members(self) -> Sequence[CandidateRun]:
        runs = [run for candidate in self.candidates for run in candidate.runs]
        return runs if self._base_run is None else [*runs, self._base_run]

    @property
    def tokens_per_step(self) -> int:
        return max(1, sum(run.tokens_per_step for run in self.members if not run.is_finished))

    @property
    def learning_rate(self) -> float:
        return self.leader.final.learning_rate

    @property
    def published_plan(self) -> TrainingPlan:
        return replace(self.plan, learning_rate=self.leader.final.plan.learning_rate)

    @property
    def published_R(self) -> Tensor:
        return self.best_R

    @property
    def published_step(self) -> int:
        kept = self.leader.kept
        return 0 if kept is None or self._publishes_base else kept.step

    @property
    def published_valid_loss(self) -> float | None:
        if self._publishes_base:
            return self.progress.base_valid_loss
        return None if self.leader.kept is None else self.leader.kept.loss

    @property
    def published_valid_accuracy(self) -> float | None:
        kept = self.leader.kept
        if kept is None or self._publishes_base:
            return super().published_valid_accuracy
        return kept.accuracy

    @property
    def search_report(self) -> dict[str, Any] | None:
        """Return the candidates and what became of them, as JSON; None for one run at a given rate."""
        if not self._is_search:
            return None
        return {
            "folds": self.ladder.num_folds,
            "candidates": [self._report(candidate) for candidate in self.candidates],
        }

    def settle(self, updates: list[RunUpdate]) -> list[RunUpdate]:
        """Judge the candidates if they were evaluated, and return the updates of the leading one."""
        if self.is_finished:
            return []
        for run in self.members:
            run.is_stop_requested = self.is_stop_requested
        leader = self.leader.final
        steps = [update for update in updates if update.run_id == leader.run_id and update.learning_rate > 0]
        settled = self._judge()
        final, progress = self.leader.final.progress, self.progress
        progress.step, progress.num_updates = final.step, final.num_updates
        progress.trained_tokens, progress.train_loss = final.trained_tokens, final.train_loss
        settled += [replace(update, run_id=self.run_id, warnings=[], finish_reason=None) for update in steps]
        if self.is_finished:
            settled[-1].finish_reason = progress.finish_reason
        return settled

    @property
    def _is_search(self) -> bool:
        """Whether there is more than one run that is only compared with the base model."""
        return self.ladder.num_runs > 1

    @property
    def _publishes_base(self) -> bool:
        """Whether no candidate is better than the base model, with which training did not begin."""
        base, kept = self.progress.base_valid_loss, self.leader.kept
        if base is None or self._start.is_adapter or self.plan.publish == LAST:
            return False
        return kept is None or kept.loss >= base

    def state(self) -> dict[str, Tensor]:
        running = [run for run in self.members if not run.is_finished]
        stacked = {
            name: torch.stack([getattr(run, name).detach().cpu() for run in running])
            if running
            else torch.zeros(0)
            for name in ("R", "m", "v")
        }
        kept = torch.stack([candidate.final.best_R for candidate in self.candidates])
        written = torch.tensor(list(json.dumps(self._written()).encode()), dtype=torch.uint8)
        return {**stacked, "kept": kept, "best_R": self.best_R.contiguous(), "search": written}

    def restore_state(self, tensors: dict[str, Tensor]) -> None:
        written = json.loads(bytes(tensors["search"].tolist()))
        if tensors["kept"].shape != (len(self.candidates), *self.best_R.shape):
            raise ValueError(f"the kept states have the shape {list(tensors['kept'].shape)}")
        for run, progress in zip(self.members, written["runs"], strict=True):
            run.progress = Progress(**progress)
        running = [run for run in self.members if not run.is_finished]
        for name in ("R", "m", "v"):
            for run, tensor in zip(running, tensors[name], strict=True):
                setattr(run, name, tensor.clone())
        for candidate, values, kept in zip(
            self.candidates, written["candidates"], tensors["kept"], strict=True
        ):
            candidate.restore(values)
            candidate.final.best_R = kept.clone()
        self.leader = self.candidates[written["leader"]]
        self.best_R = tensors["best_R"]

    def _written(self) -> dict[str, Any]:
        return {
            "leader": self.candidates.index(self.leader),
            "runs": [asdict(run.progress) for run in self.members],
            "candidates": [candidate.written() for candidate in self.candidates],
        }

    def _judge(self) -> list[RunUpdate]:
        """Take the evaluations of this step, if there were any, and drop the worse candidates."""
        evaluated = [candidate for candidate in self.candidates if candidate.has_news]
        for candidate in self.candidates:
            if candidate.has_diverged:
                candidate.end("diverged")
        if self._base_run is not None and self._base_run.measured is not None:
            self.progress.base_valid_loss = self._base_run.progress.valid_loss
        if evaluated:
            for candidate in evaluated:
                candidate.record_evaluation(keep_last=self.plan.publish == LAST)
            return [self._compare(evaluated[0].evaluations[-1].step)]
        if not any(candidate.is_running for candidate in self.candidates):
            return [self._finish(self._evaluation_update([]))]
        return []

    def _compare(self, step: int) -> RunUpdate:
        """Rank the candidates after an evaluation, drop the worse ones, and end the run if it is time."""
        contenders = rank_candidates(
            [candidate for candidate in self.candidates if candidate.dropped_at is None]
        )
        self.leader = contenders[0]
        notes = []
        for candidate in contenders[self._num_kept(step) :]:
            candidate.drop(step)
            notes.append(self._drop_note(candidate))
        patience, min_delta = self.plan.patience, self.plan.min_delta
        for candidate in contenders:
            if patience is not None and candidate.num_bad_evaluations(min_delta) >= patience:
                candidate.end("early_stop")
        progress = self.progress
        progress.evaluated_at, progress.num_bad_evaluations = step, self.leader.num_bad_evaluations(min_delta)
        progress.valid_loss = self.leader.evaluations[-1].loss
        if progress.initial_valid_loss is None:
            progress.initial_valid_loss = progress.valid_loss
        self._offer_state(step)
        update = self._evaluation_update(notes)
        is_running = any(candidate.is_running for candidate in contenders)
        return update if is_running else self._finish(update)

    def _offer_state(self, step: int) -> None:
        """Let the leader's state be served while the search goes on, if it was evaluated at this step."""
        R = self.leader.final.evaluated_R
        if step > 0 and R is not None and self.leader.evaluations[-1].step == step:
            self._new_states.append(EvaluatedState(step, R))

    def _num_kept(self, step: int) -> int:
        """Return how many candidates stay in the race after an evaluation at this step."""
        num, total = len(self.candidates), self.plan.total_steps
        if 3 * step >= 2 * total:
            return 1
        return math.ceil(num / 2) if 3 * step >= total else num

    def _evaluation_update(self, notes: list[tuple[str, dict[str, Any]]]) -> RunUpdate:
        progress, evaluation = self.progress, self.leader.evaluations[-1]
        step = max(candidate.evaluations[-1].step for candidate in self.candidates if candidate.evaluations)
        if self.leader.best is not None:
            progress.best_valid_loss, progress.best_step = self.leader.best.loss, self.leader.best.step
        self.best_R = self.leader.final.best_R
        update = self.update()
        update.step = step
        update.valid_loss, update.valid_accuracy = evaluation.loss, evaluation.accuracy
        update.details = {"valid_exact": evaluation.exact, "valid_mean_token_accuracy": evaluation.accuracy}
        update.notes = notes
        return update

    def _finish(self, update: RunUpdate) -> RunUpdate:
        """End the run with the leader's kept state, or with the base model's if nothing was better."""
        progress = self.progress
        if self.is_stop_requested:
            progress.finish_reason = "stopped"
        elif all(candidate.has_diverged for candidate in self.candidates) and not progress.best_step:
            progress.finish_reason = "diverged"
        else:
            is_whole = self.leader.final.progress.step >= self.plan.total_steps
            progress.finish_reason = "completed" if is_whole else "early_stop"
        if self._publishes_base:
            assert self._base_run is not None
            self.best_R = self._base_run.R.clone()
        update.finish_reason = progress.finish_reason
        if self._is_search:
            update.notes.append(self._choice_note())
        return update

    def _make_candidate(self, multiple: float) -> Candidate:
        plan = replace(self.plan, learning_rate=self.plan.learning_rate * multiple)

        def make(name: str, data: TrainingData) -> CandidateRun:
            run_id = f"{self.run_id}/{multiple:g}/{name}"
            return CandidateRun(run_id, data, plan, self.basis, start=self._start.core, scaling=self._scaling)

        if not self._fold_data:
            final = make("all", self.data)
            return Candidate(multiple, final, [final])
        everything = replace(self.data, valid=self.data.train, valid_sizes=self.data.train_sizes)
        judges = [make(str(fold), data) for fold, data in enumerate(self._fold_data)]
        return Candidate(multiple, make("all", everything), judges)

    def _make_base_run(self) -> CandidateRun:
        """Return a run that makes no step: it is evaluated once, with a core of zero."""
        data = self.candidates[0].final.data
        return CandidateRun(f"{self.run_id}/base", data, replace(self.plan, total_steps=0), self.basis)

    def _report(self, candidate: Candidate) -> dict[str, Any]:
        kept = candidate.kept
        return {
            "learning_rate": candidate.final.plan.learning_rate,
            "multiplier": candidate.multiple,
            "valid_loss": None if kept is None else kept.loss,
            "exact": None if kept is None else kept.exact,
            "best_step": None if kept is None else kept.step,
            "steps": candidate.final.progress.step,
            "chosen": candidate is self.leader,
        }

    def _drop_note(self, candidate: Candidate) -> tuple[str, dict[str, Any]]:
        report = self._report(candidate)
        message = (
            f"Learning rate {report['learning_rate']:g} is given up at step {candidate.dropped_at}: "
            f"validation loss {_shown(report['valid_loss'])}"
        )
        return message, {"search": report}

    def _choice_note(self) -> tuple[str, dict[str, Any]]:
        report = self._report(self.leader)
        message = (
            f"Learning rate {report['learning_rate']:g} is chosen, {self.leader.multiple:g} times the usual "
            f"one: validation loss {_shown(report['valid_loss'])} at step {report['best_step']}"
        )
        return message, {"search": self.search_report}


def _split_into_folds(data: TrainingData, num_folds: int) -> list[TrainingData]:
    """Return for each fold the other examples to train on, with the fold's own to judge by."""
    if not num_folds:
        return []
    folds = assign_folds(data.groups, num_folds)
    indices = range(data.num_train)
    return [
        data.select(
            train=[index for index in indices if folds[index] != fold],
            valid=[index for index in indices if folds[index] == fold],
        )
        for fold in range(num_folds)
    ]


def _shown(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"
