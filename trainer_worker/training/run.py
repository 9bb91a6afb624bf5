"""The state of one job's training, whatever its form, and the rules by which it ends.

The rules for the best state, for early stopping and for losses that are not finite are here. Knows no model,
no Redis and no clock. The two forms: `CoreRun` (`trainer.py`) and `LoraRun` (`lora/trainer.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from tessera.chat.chat_format import EncodedExample
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tessera.queue.hyperparameters import LAST
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.history import History
from trainer_worker.training.objectives.objective import SUPERVISED, Measured, Objective, Sample
from trainer_worker.training.objectives.references import TOKENS_PER_TRAINED_TOKEN, References
from trainer_worker.training.plan import TrainingPlan

#: Evaluated states that wait to be taken; a store that does not answer makes older ones go.
MAX_WAITING_STATES = 3
#: The tensors of a run that are in every checkpoint.
STATE_TENSORS = ("R", "m", "v", "best_R")


@dataclass
class Progress:
    """The progress of a run. All fields are JSON and part of the run's checkpoint."""

    #: Optimization steps that were made or left out.
    step: int = 0
    #: Steps of the optimizer since its moments were zero.
    num_updates: int = 0
    trained_tokens: int = 0
    #: Losses are in nats per token.
    train_loss: float | None = None
    valid_loss: float | None = None
    initial_valid_loss: float | None = None
    #: That of the base model, where training does not begin with it and it was measured.
    base_valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int = 0
    #: The step of the last evaluation.
    evaluated_at: int | None = None
    #: Evaluations since the best one.
    num_bad_evaluations: int = 0
    #: Steps with a loss or a gradient that was not finite.
    num_nonfinite: int = 0
    #: Factor on the plan's learning rate, halved when the run goes back to its best state.
    learning_rate_factor: float = 1.0
    #: "completed", "early_stop", "stopped" or "diverged"; None while the run goes on.
    finish_reason: str | None = None


@dataclass
class RunUpdate:
    """One evaluation or one optimization step of a run, and where the run stands after it."""

    run_id: str
    step: int = 0
    total_steps: int = 0
    #: The learning rate of the step that was made; 0 for an evaluation.
    learning_rate: float = 0.0
    trained_tokens: int = 0
    #: Losses are in nats per token, of pairs in nats per pair; None where none was measured. Accuracies are
    #: those of `Measured`.
    train_loss: float | None = None
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    #: What the metrics event of the update shows besides, by name.
    details: dict[str, float] = field(default_factory=dict)
    #: While the reference of a run with pairs is computed: the number of finished pairs, and of all.
    reference_progress: tuple[int, int] | None = None
    finish_reason: str | None = None
    #: Messages for the job's owner: a sentence and the data of its event.
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    #: Warnings for the job's owner, as (code, sentence).
    warnings: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class TokenCounts:
    """Tokens that went through the model."""

    train: int = 0
    eval: int = 0
    pad: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.train + other.train, self.eval + other.eval, self.pad + other.pad)

    def __sub__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.train - other.train, self.eval - other.eval, self.pad - other.pad)


@dataclass(frozen=True)
class EvaluatedState:
    """R at an evaluation after the first step, which may be served while the run goes on."""

    step: int
    R: Tensor


@dataclass(frozen=True)
class RunResult:
    """The published state of a run in stored form."""

    adapter: Adapter
    #: The basis that was trained together with the adapter; None if the adapter uses a stored one.
    own_basis: Basis | None = None
    #: The stored basis that the adapter uses; None if it has one of its own.
    stored_basis: Basis | None = None


class RunTrainer(Protocol):
    """Trains one run or several at once, in shared passes through the model."""

    #: Everything that went through the model so far.
    tokens: TokenCounts

    @property
    def runs(self) -> Sequence[TrainRun]: ...

    @property
    def is_reusable(self) -> bool:
        """Whether further runs can join after all runs have left."""

    def try_join(self, run: TrainRun) -> bool:
        """Make the run resident if it can train with the others; returns whether it did."""

    def leave(self, run_id: str) -> TrainRun | None:
        """Take a run out, with its tensors; None if it is not resident."""

    def step(self) -> list[RunUpdate]:
        """Evaluate the runs that are due, then make one optimization step of each unfinished run."""


class TrainRun(ABC):
    """The whole state of one job's training. Subclasses say what is trained and how it is stored."""

    #: The trained numbers and Adam's moments, all of one shape. While the run is resident in a trainer, these
    #: three are views of the trainer's memory.
    R: Tensor
    m: Tensor
    v: Tensor
    #: R at the lowest validation loss so far; the last evaluated R if there is no validation data.
    best_R: Tensor
    #: Notes on how the first R was computed, as JSON; None if it is zero or the R of another adapter.
    init_notes: dict[str, Any] | None
    #: Whether `states` are kept, because a state can be stored as an adapter at little cost.
    keeps_states = False

    def __init__(
        self,
        run_id: str,
        data: TrainingData,
        plan: TrainingPlan,
        *,
        R: Tensor,
        objective: Objective = SUPERVISED,
    ) -> None:
        """R: what training begins with, on the CPU. A preference objective needs data of pairs."""
        assert objective.is_preference == bool(data.train_chosen)
        self.run_id, self.data, self.plan, self.objective = run_id, data, plan, objective
        #: The log-probabilities that pairs are compared with; None if the objective needs none.
        self.references = References(data) if objective.needs_reference else None
        self.R, self.m, self.v = R, R.new_zeros(R.shape), R.new_zeros(R.shape)
        self.best_R = R.clone()
        #: The latest evaluated states that nobody has taken yet, oldest first, with their measurements in the
        #: history.
        self.states: deque[EvaluatedState] = deque(maxlen=MAX_WAITING_STATES)
        self._new_states: list[EvaluatedState] = []
        self.progress = Progress()
        self.history = History()
        self.init_notes = None
        #: The owner wants the run to end: it is evaluated once more, and its best state counts. May be set
        #: by another thread.
        self.is_stop_requested = False

    @property
    @abstractmethod
    def basis_id(self) -> str:
        """The id of the stored basis that the run trains in; "" if it trains a basis itself."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """A checkpoint is valid only for a run with the same identity, data and plan."""

    @property
    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Return the facts about the training, as JSON for the adapter's metadata."""

    @abstractmethod
    def make_trainer(self, base: BaseModel, *, max_runs: int, token_budget: int) -> RunTrainer:
        """Return a new trainer in which this run is resident. max_runs: how many runs may train together.

        token_budget: tokens with padding in one pass. Raises `BasisMismatch`, `UnsupportedModel`.
        """

    @abstractmethod
    def to_result(self, base: BaseModel, metadata: dict[str, Any]) -> RunResult:
        """Return `published_R` in stored form. metadata: the metadata of the adapter."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, on the CPU."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in STATE_TENSORS}
        return tensors | self.more_state()

    def restore_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises `KeyError` or `ValueError`.

        After an error a run with more state than its cores (`more_state`) is unusable, others are unchanged.
        """
        for name in STATE_TENSORS:
            if tensors[name].shape != self.R.shape:
                raise ValueError(f"{name} has the shape {list(tensors[name].shape)}")
        self.restore_more(tensors)
        for name in STATE_TENSORS:
            setattr(self, name, tensors[name])

    def more_state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint needs in addition to R, m, v, best_R and the progress."""
        return {} if self.references is None else {"reference": self.references.logps}

    def restore_more(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `more_state` returned. Raises `KeyError` or `ValueError`; the run is unusable then."""
        if self.references is not None:
            self.references.restore(tensors["reference"])

    @property
    def awaits_reference(self) -> bool:
        """Whether log-probabilities of the reference are still missing; until then the run makes no step."""
        return self.references is not None and not self.references.is_complete

    @property
    def published_R(self) -> Tensor:
        """What the job publishes, of the shape of R, on the CPU: the best state or the last."""
        return self.R.detach().cpu() if self.plan.publish == LAST else self.best_R

    @property
    def published_step(self) -> int:
        """The step of `published_R`."""
        return self.progress.step if self.plan.publish == LAST else self.progress.best_step

    @property
    def published_valid_loss(self) -> float | None:
        """The validation loss of `published_R`, in nats per token; None without validation data."""
        progress = self.progress
        return progress.valid_loss if self.plan.publish == LAST else progress.best_valid_loss

    @property
    def published_valid_accuracy(self) -> float | None:
        """The accuracy of `published_R` on the validation data; None if it was not measured."""
        return self.history.at(self.published_step).valid_accuracy

    @property
    def published_plan(self) -> TrainingPlan:
        """The plan by which what is published was trained."""
        return self.plan

    @property
    def search_report(self) -> dict[str, Any] | None:
        """The learning rates that were tried, as JSON; None if there was no search."""
        return None

    @property
    def is_finished(self) -> bool:
        return self.progress.finish_reason is not None

    @property
    def tokens_per_step(self) -> int:
        """Estimated tokens of one optimization step."""
        return max(1, self.data.num_train_tokens * self.plan.batch_size // self.data.num_train)

    @property
    def learning_rate(self) -> float:
        return self.plan.learning_rate_at(self.progress.step) * self.progress.learning_rate_factor

    @property
    def needs_evaluation(self) -> bool:
        step = self.progress.step
        is_due = step % self.plan.evaluate_every == 0 or step >= self.plan.total_steps or self._should_stop
        return is_due and self.progress.evaluated_at != step

    @property
    def _should_stop(self) -> bool:
        return self.is_stop_requested and self.progress.step > 0

    def next_batch(self) -> list[Sample]:
        """Return the samples of the next step."""
        plan = self.plan
        indices = self.data.batch_indices(self.progress.step, batch_size=plan.batch_size, seed=plan.seed)
        return self._samples(self.data.train_examples, self.data.train_chosen, indices, first=0)

    def validation(self) -> list[Sample]:
        """Return the samples of an evaluation."""
        indices = list(range(self.data.num_valid))
        first = self.data.num_train
        return self._samples(self.data.valid_examples, self.data.valid_chosen, indices, first=first)

    def _samples(
        self,
        examples: Sequence[tuple[EncodedExample, ...]],
        chosen: Sequence[int],
        indices: Sequence[int],
        *,
        first: int,
    ) -> list[Sample]:
        """first: the number of the first of these examples among all pairs of the run."""
        if not chosen:
            return [Sample(examples[i]) for i in indices]
        if self.references is None:
            return [Sample(examples[i], chosen[i]) for i in indices]
        return [Sample(examples[i], chosen[i], self.references.of(first + i)) for i in indices]

    def record_evaluation(self, measured: Measured | None) -> None:
        """Keep R if it is the best so far, and decide whether the run has ended.

        measured: None if there is no validation data; then every R is the best so far.
        """
        progress = self.progress
        valid_loss = None if measured is None else measured.loss
        if valid_loss is not None and not math.isfinite(valid_loss):
            valid_loss = math.inf  # NaN compares as neither larger nor smaller than anything
        progress.evaluated_at = progress.step
        if self.keeps_states and progress.step > 0:
            self._new_states.append(EvaluatedState(progress.step, self.R.detach().cpu().clone()))
        progress.valid_loss = valid_loss
        if valid_loss is None:
            self._keep()
        elif progress.initial_valid_loss is None:
            progress.initial_valid_loss = valid_loss
            self._keep(valid_loss)
        elif progress.best_valid_loss is None or valid_loss < progress.best_valid_loss:
            best, num_bad = progress.best_valid_loss, progress.num_bad_evaluations
            self._keep(valid_loss)
            if best is not None and valid_loss >= best - self.plan.min_delta:
                progress.num_bad_evaluations = num_bad + 1
        else:
            progress.num_bad_evaluations += 1
        if progress.step >= self.plan.total_steps:
            progress.finish_reason = "completed"
        elif self._should_stop:
            progress.finish_reason = "stopped"
        elif self.plan.patience is not None and progress.num_bad_evaluations >= self.plan.patience:
            progress.finish_reason = "early_stop"

    def record_step(self, train_loss: float, num_tokens: int) -> None:
        """Count a step of the optimizer."""
        self.progress.step += 1
        self.progress.num_updates += 1
        self.progress.trained_tokens += num_tokens
        self.progress.train_loss = train_loss

    def record_nonfinite(self) -> tuple[str, str]:
        """React to a step with a loss or gradient that is not finite; returns a warning as (code, sentence).

        The first time the step is left out (a single bad batch happens in half precision). The second time
        the run goes back to its best R with half the learning rate. The third time it has diverged.
        """
        progress = self.progress
        progress.step += 1
        progress.num_nonfinite += 1
        where = f"the loss or its gradient was not finite at step {progress.step}"
        if progress.num_nonfinite == 1:
            return "nonfinite_skipped", f"{where}; the step was left out"
        if progress.num_nonfinite == 2:
            progress.learning_rate_factor /= 2
            progress.num_updates = 0
            self.R.copy_(self.best_R)
            self.m.zero_()
            self.v.zero_()
            return (
                "nonfinite_rolled_back",
                f"{where} again; training went back to the best state and continues at half the rate",
            )
        progress.finish_reason = "diverged"
        return "training_diverged", f"{where} for the third time; try a smaller learning_rate_multiplier"

    def update(
        self, *, learning_rate: float = 0.0, warnings: list[tuple[str, str]] | None = None
    ) -> RunUpdate:
        """Return the current state as an update, to which the trainer adds its measurements."""
        return RunUpdate(
            self.run_id,
            step=self.progress.step,
            total_steps=self.plan.total_steps,
            learning_rate=learning_rate,
            trained_tokens=self.progress.trained_tokens,
            finish_reason=self.progress.finish_reason,
            warnings=warnings or [],
        )

    def note(self, update: RunUpdate) -> None:
        """Add an update to the history. Only then are the states of its evaluation given to others."""
        self.history.note(update)
        self.states.extend(self._new_states)
        self._new_states.clear()

    def show_step(self, update: RunUpdate, measured: Measured) -> None:
        """Add to an update what a training step has measured."""
        update.train_loss, update.train_accuracy = measured.loss, measured.accuracy
        update.details |= self.objective.event_values(measured, is_held_out=False)

    def show_evaluation(self, update: RunUpdate, measured: Measured) -> None:
        """Add to an update what an evaluation has measured."""
        update.valid_loss, update.valid_accuracy = measured.loss, measured.accuracy
        update.details |= self.objective.event_values(measured, is_held_out=True)

    def reference_samples(self, *, min_tokens: int = 0) -> list[Sample]:
        """Return the pairs whose reference a step computes next: as much work as one step of this run.

        min_tokens: on a GPU, what fills one pass.
        """
        assert self.references is not None
        return self.references.next_samples(max(min_tokens, TOKENS_PER_TRAINED_TOKEN * self.tokens_per_step))

    def record_reference(self, logps: Tensor) -> RunUpdate:
        """Take the log-probabilities of `reference_samples`."""
        assert self.references is not None
        self.references.add(logps)
        update = self.update()
        update.reference_progress = self.references.progress
        return update

    def _keep(self, valid_loss: float | None = None) -> None:
        self.best_R = self.R.detach().cpu().clone()
        self.progress.best_valid_loss = valid_loss
        self.progress.best_step = self.progress.step
        self.progress.num_bad_evaluations = 0
