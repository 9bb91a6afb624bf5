"""From a job's data and basis to its run: how it is planned, and whether it searches for its learning rate.

Knows no store and no event loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tessera.formats.basis import Basis
from tessera.methods.scaling import Scaling
from tessera.model.base_model import BaseModel
from tessera.queue.records import JobSpec
from trainer_worker.data.training_data import TrainingData
from trainer_worker.preparing.initialization import BASE_MODEL, InitChoice
from trainer_worker.training.learning_rates import BasisKind
from trainer_worker.training.objectives.objective import Objective
from trainer_worker.training.plan import TrainingPlan, has_automatic_rate, make_plan
from trainer_worker.training.search.ladder import ONE_RUN, Ladder, choose_ladder, idle_tokens
from trainer_worker.training.search.search_run import SearchRun, Start
from trainer_worker.training.trainer import CoreRun, core_scale


@dataclass(frozen=True)
class PlannedRun:
    """What a job in the r x r form will train, before its first R is known."""

    data: TrainingData
    plan: TrainingPlan
    basis: Basis
    #: None: one run, which is not compared with the base model because it begins with it.
    ladder: Ladder | None
    objective: Objective
    scaling: Scaling
    #: Whether training begins with the base model, or with an adapter of the owner.
    starts_with_base: bool
    starts_with_adapter: bool

    @property
    def has_folds(self) -> bool:
        return self.ladder is not None and self.ladder.num_folds > 0

    def make(self, run_id: str, core: Tensor | None = None) -> CoreRun:
        """Return the run. core: the stored core to begin with, [M, r, r]; None: the base model, or a run that
        a checkpoint will be put into.
        """
        if self.ladder is None:
            return CoreRun(
                run_id,
                self.data,
                self.plan,
                self.basis,
                start=core,
                scaling=self.scaling,
                objective=self.objective,
                refers_to_base=not self.starts_with_adapter,
            )
        start = Start(core, is_base=self.starts_with_base, is_adapter=self.starts_with_adapter)
        return SearchRun(
            run_id, self.data, self.plan, self.basis, self.ladder, start=start, scaling=self.scaling
        )


def plan_run(
    spec: JobSpec,
    data: TrainingData,
    basis: Basis,
    init: InitChoice,
    base: BaseModel,
    objective: Objective,
    *,
    may_search: bool,
) -> PlannedRun:
    """Plan the run of a job. may_search: by the worker's settings. Raises `InvalidInput`."""
    kind = BasisKind.of(
        basis, start=init.method, scale=core_scale(basis, spec.scaling), objective=spec.objective
    )

    def plan_for(data: TrainingData) -> TrainingPlan:
        return make_plan(
            spec.hyperparameters,
            spec.early_stopping,
            num_examples=data.num_train,
            kind=kind,
            seed=spec.seed,
        )

    plan = plan_for(data)
    starts_with_base = init.method == BASE_MODEL
    ladder = None
    is_pairwise = objective.is_preference
    if may_search and not is_pairwise and has_automatic_rate(spec.hyperparameters):
        ladder = _choose_ladder(data, plan, base)
    if ladder is not None and ladder.num_folds:
        data = data.pooled()
        plan = plan_for(data)
    if ladder is None and data.valid and not starts_with_base and not is_pairwise:
        ladder = ONE_RUN
    return PlannedRun(
        data,
        plan,
        basis,
        ladder,
        objective,
        spec.scaling,
        starts_with_base,
        starts_with_adapter=spec.warm_start_from is not None,
    )


def _choose_ladder(data: TrainingData, plan: TrainingPlan, base: BaseModel) -> Ladder | None:
    num_examples = data.num_train + (data.num_valid if data.groups else 0)
    num_parameters = sum(parameter.numel() for parameter in base.model.parameters())
    return choose_ladder(
        num_examples=num_examples,
        num_groups=len(set(data.groups)),
        tokens_per_step=max(1, data.num_train_tokens * plan.batch_size // data.num_train),
        max_tokens=idle_tokens(is_gpu=base.device.type == "cuda", num_parameters=num_parameters),
        has_held_out=bool(data.valid),
    )
