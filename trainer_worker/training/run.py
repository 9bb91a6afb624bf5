"""One job's training, apart from the model: what it is at, what a step or an evaluation makes of it.

Knows no model, no Redis and no clock. The rules for the best checkpoint, for stopping early and for losses
that are not finite stand here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tessera.chat.chat_format import EncodedExample
from tessera.errors import InvalidInput
from tessera.formats.basis import Basis
from trainer_worker.training.data import TrainingData
from trainer_worker.training.plan import TrainingPlan


@dataclass
class Progress:
    """How far a run is: JSON fields only, all of them in its checkpoint.

    step: optimisation steps made or skipped. num_updates: steps of the optimiser since its moments were zero.
    evaluated_at: the step of the last evaluation. finish_reason: "completed", "early_stop", "diverged".
    """

    step: int = 0
    num_updates: int = 0
    trained_tokens: int = 0
    train_loss: float | None = None
    valid_loss: float | None = None
    initial_valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int = 0
    evaluated_at: int | None = None
    num_bad_evaluations: int = 0
    num_nonfinite: int = 0
    learning_rate_factor: float = 1.0
    finish_reason: str | None = None


@dataclass
class RunUpdate:
    """An evaluation of a run or an optimisation step, and where the run stands after it.

    Losses in nats per token, None where none was measured. learning_rate: of the step made, 0 at evaluations.
    warnings: (code, sentence) of what the user should know.
    """

    run_id: str
    step: int = 0
    total_steps: int = 0
    learning_rate: float = 0.0
    trained_tokens: int = 0
    train_loss: float | None = None
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    finish_reason: str | None = None
    warnings: list[tuple[str, str]] = field(default_factory=list)


class TrainRun:
    """The whole state of one job's training.

    R (the trained core R' of `Basis.fold`), m, v: [M, r, r]; views of the trainer's memory while resident.
    best_R: the R of the lowest validation loss so far; the last one if there is no validation data.
    """

    def __init__(
        self,
        run_id: str,
        data: TrainingData,
        plan: TrainingPlan,
        basis: Basis,
        *,
        start: Tensor | None = None,
    ) -> None:
        """start: the stored core to begin with, [M, r, r]; None begins with the base model.

        Raises `InvalidInput` for a start of another shape.
        """
        shape = (basis.num_modules, basis.rank, basis.rank)
        if start is not None and tuple(start.shape) != shape:
            message = f"the adapter to start from has R {list(start.shape)}, the basis needs {list(shape)}"
            raise InvalidInput(message, param="warm_start_from")
        self.run_id, self.data, self.plan, self.basis_id = run_id, data, plan, basis.basis_id
        self.R = torch.zeros(shape) if start is None else basis.unfold(start.double()).float()
        self.m, self.v = torch.zeros(shape), torch.zeros(shape)
        self.best_R = self.R.clone()
        self.progress = Progress()
        #: How it came to its first R, as JSON; None: from the base model or an adapter as it was.
        self.start_notes: dict[str, Any] | None = None

    @property
    def identity(self) -> str:
        """What a checkpoint of this run is only valid with, beside its data and its plan."""
        return self.basis_id

    def more_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside R, m, v, best_R and the progress."""
        return {}

    def restore_more(self, tensors: dict[str, Tensor]) -> None:
        """Take what `more_state` gave. Raises `KeyError` or `ValueError`; the run is of no use then."""

    @property
    def is_finished(self) -> bool:
        return self.progress.finish_reason is not None

    @property
    def tokens_per_step(self) -> int:
        """About how many tokens an optimisation step of this run has."""
        return max(1, self.data.num_train_tokens * self.plan.batch_size // self.data.num_train)

    @property
    def learning_rate(self) -> float:
        return self.plan.learning_rate_at(self.progress.step) * self.progress.learning_rate_factor

    @property
    def needs_evaluation(self) -> bool:
        step = self.progress.step
        is_due = step % self.plan.evaluate_every == 0 or step >= self.plan.total_steps
        return is_due and self.progress.evaluated_at != step

    def next_batch(self) -> list[EncodedExample]:
        return self.data.batch(self.progress.step, batch_size=self.plan.batch_size, seed=self.plan.seed)

    def record_evaluation(self, valid_loss: float | None) -> None:
        """Keep R if it is the best so far; decide whether the run has ended. None: nothing to validate on."""
        progress = self.progress
        if valid_loss is not None and not math.isfinite(valid_loss):
            valid_loss = math.inf  # NaN is neither above nor below anything
        progress.evaluated_at = progress.step
        progress.valid_loss = valid_loss
        if valid_loss is None:
            self._keep()
        elif progress.initial_valid_loss is None:
            progress.initial_valid_loss = valid_loss
            self._keep(valid_loss)
        elif progress.best_valid_loss is None or valid_loss < progress.best_valid_loss - self.plan.min_delta:
            self._keep(valid_loss)
        else:
            progress.num_bad_evaluations += 1
        if progress.step >= self.plan.total_steps:
            progress.finish_reason = "completed"
        elif self.plan.patience is not None and progress.num_bad_evaluations >= self.plan.patience:
            progress.finish_reason = "early_stop"

    def record_step(self, train_loss: float, num_tokens: int) -> None:
        """After a step of the optimiser."""
        self.progress.step += 1
        self.progress.num_updates += 1
        self.progress.trained_tokens += num_tokens
        self.progress.train_loss = train_loss

    def record_nonfinite(self) -> tuple[str, str]:
        """After a step whose loss or gradient is not finite: what is done about it, as (code, sentence).

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
                f"{where} again; back to the best R at half the rate",
            )
        progress.finish_reason = "diverged"
        return "training_diverged", f"{where} for the third time; try a smaller learning_rate_multiplier"

    def update(
        self, *, learning_rate: float = 0.0, warnings: list[tuple[str, str]] | None = None
    ) -> RunUpdate:
        """The state as news; what was measured is to be added."""
        return RunUpdate(
            self.run_id,
            step=self.progress.step,
            total_steps=self.plan.total_steps,
            learning_rate=learning_rate,
            trained_tokens=self.progress.trained_tokens,
            finish_reason=self.progress.finish_reason,
            warnings=warnings or [],
        )

    def _keep(self, valid_loss: float | None = None) -> None:
        self.best_R = self.R.detach().cpu().clone()
        self.progress.best_valid_loss = valid_loss
        self.progress.best_step = self.progress.step
        self.progress.num_bad_evaluations = 0
