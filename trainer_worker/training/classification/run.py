"""The state of one classification job: cores R' in a stored basis and a head, as one packed vector.

    R, m, v, best_R   [P],  P = M r² + C (d + 1):  the cores [M, r, r], then the head [C, d + 1]

Adam's step does not depend on the scale of a gradient. So the head is trained as W' with W = s W', and a step
η of W' is a step s η of W: one learning rate and one schedule serve both parts, and s is the ratio of their
rates. Epsilon apart, this equals two optimizers. For SGD, whose step of W is s² η times the gradient, s is
the root of that ratio.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.formats.head import ClassificationHead
from tessera.model.base_model import BaseModel
from tessera.queue.hyperparameters import ADAMW
from trainer_worker.training.classification.data import LabelledData
from trainer_worker.training.classification.trainer import ClassificationTrainer
from trainer_worker.training.objectives.objective import JudgedPairs, Measured
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.run import RunResult, RunUpdate, TrainRun


@dataclass(frozen=True)
class Classified:
    """The mean loss of the classes, or the mean squared error of standardised scores."""

    is_regression: bool
    is_preference = False
    needs_reference = False

    def judge(self, logps: Tensor, reference: Tensor, lengths: Tensor) -> JudgedPairs:
        raise AssertionError("labelled texts are not pairs")

    def event_values(self, measured: Measured, *, is_held_out: bool) -> dict[str, float]:
        if self.is_regression:
            return {}
        return {"valid_accuracy" if is_held_out else "train_accuracy": measured.accuracy}


class ClassificationRun(TrainRun):
    """A run that trains cores in a stored basis and a classification head."""

    def __init__(
        self,
        run_id: str,
        labelled: LabelledData,
        plan: TrainingPlan,
        basis: Basis,
        *,
        width: int,
        head_rate: float,
        head_only: bool = False,
        trains_bias: bool = False,
        start: Tensor | None = None,
    ) -> None:
        """width: d, of the hidden state that the head reads. head_rate: the head's peak learning rate.

        head_only: leave the cores at zero, so that the head reads the base model's states. trains_bias: as
        transformers does for encoders; the heads of its causal models have no bias. start: packed numbers [P]
        to begin with; None begins with zero cores and a zero head.
        """
        self.trains_bias = trains_bias
        self.basis, self.labelled, self.width, self.head_only = basis, labelled, width, head_only
        ratio = head_rate / plan.learning_rate
        self.head_rate = head_rate
        self.head_scale = ratio if plan.optimizer == ADAMW else ratio**0.5
        size = self.num_core + self.num_scores * (width + 1)
        R = torch.zeros(size) if start is None else start
        super().__init__(run_id, labelled.data, plan, R=R, objective=Classified(not labelled.labels))

    @property
    def num_core(self) -> int:
        """Return how many of the numbers belong to the cores."""
        return math.prod(self.basis.cores.shape)

    @property
    def num_scores(self) -> int:
        return self.labelled.num_scores

    @property
    def is_regression(self) -> bool:
        return not self.labelled.labels

    @property
    def basis_id(self) -> str:
        return self.basis.basis_id

    @property
    def identity(self) -> str:
        labels = [*self.labelled.labels]
        return json.dumps(["classification", self.basis_id, labels, self.head_scale, self.head_only])

    @property
    def provenance(self) -> dict[str, Any]:
        return {"method": self.basis.manifest.method, "head_only": self.head_only}

    def make_trainer(self, base: BaseModel, *, max_runs: int, token_budget: int) -> ClassificationTrainer:
        trainer = ClassificationTrainer(
            base,
            self.basis,
            width=self.width,
            max_scores=self.num_scores,
            max_runs=max_runs,
            token_budget=token_budget,
        )
        trainer.join(self)
        return trainer

    def to_result(self, base: BaseModel, metadata: dict[str, Any]) -> RunResult:
        """Return the published cores, with the preconditioner folded in, and their head, both in float32.

        The head of a regression gives scores in the units of the data: W ← scale W, b ← scale b + mean.
        """
        cores, packed = self.basis.cores, self.published_R.double()
        numbers = packed[: self.num_core].view(cores.shape)
        R = cores.expand(numbers).float().contiguous()
        weight = self.head_scale * packed[self.num_core :].view(self.num_scores, self.width + 1)
        if self.is_regression:
            weight = weight * self.labelled.scale
            weight[:, -1] += self.labelled.mean
        head = ClassificationHead(weight.float().contiguous(), self.labelled.labels)
        trained = None if cores.is_free else numbers.float()
        return RunResult(Adapter(self.basis_id, R, metadata, head, trained))

    def show_step(self, update: RunUpdate, measured: Measured) -> None:
        """Add to an update what a training step has measured. Scores are neither right nor wrong."""
        super().show_step(update, measured)
        if self.is_regression:
            update.train_accuracy = None

    def show_evaluation(self, update: RunUpdate, measured: Measured) -> None:
        """Add to an update what an evaluation has measured."""
        super().show_evaluation(update, measured)
        if self.is_regression:
            update.valid_accuracy = None
