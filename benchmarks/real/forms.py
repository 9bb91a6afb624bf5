"""Runs of the two forms that are co-trained, cores in a basis and LoRA's factors, behind one interface.

`automatic` of each form is the one place of the benchmark that knows what the worker trains for a job that
leaves the learning rate to the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from benchmarks.real.encoded import EncodedTask
from benchmarks.real.methods import Built, Method
from benchmarks.real.runs import Setting, SharedTrainer, plan_of
from tessera.defaults import LLAMA_LINEARS
from tessera.methods.forms import LORA_PRESETS
from tessera.queue.records import JobSpec
from trainer_worker.preparing.initialization import InitChoice
from trainer_worker.preparing.runs import plan_run
from trainer_worker.training.learning_rates import BasisKind, LoraKind
from trainer_worker.training.lora.factors import LoraFactors, form_modules, initial_factors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer
from trainer_worker.training.objectives.objective import SUPERVISED
from trainer_worker.training.plan import HasLearningRate, TrainingPlan
from trainer_worker.training.run import TrainRun
from trainer_worker.training.trainer import CoreRun, Trainer


class Form(Protocol):
    """Makes runs that can train together, and their trainer."""

    @property
    def kind(self) -> HasLearningRate: ...

    @property
    def num_parameters(self) -> int:
        """Numbers that one run trains."""

    def make(self, run_id: str, task: EncodedTask, plan: TrainingPlan) -> TrainRun:
        """Return a run that follows a plan."""

    def automatic(self, run_id: str, task: EncodedTask) -> TrainRun:
        """Return the run that the worker trains for a job with the defaults."""

    def published(self, run: TrainRun, task: EncodedTask) -> TrainRun:
        """Return a new run whose present state is what `run` publishes."""

    def gather(self, runs: Sequence[TrainRun]) -> SharedTrainer:
        """Return a trainer in which the runs have the slots 0, 1, …"""


class CoreForm:
    """Cores in the basis of `built`."""

    def __init__(self, setting: Setting, built: Built) -> None:
        self._setting, self._built = setting, built
        self.kind: BasisKind = built.kind
        self.num_parameters = built.basis.num_modules * built.basis.rank**2

    def make(self, run_id: str, task: EncodedTask, plan: TrainingPlan) -> CoreRun:
        return CoreRun(run_id, task.data, plan, self._built.basis, start=self._built.start(task.data, plan))

    def automatic(self, run_id: str, task: EncodedTask) -> CoreRun:
        setting, basis = self._setting, self._built.basis
        spec = JobSpec(
            base_model=setting.base.name, hyperparameters=dict(setting.hyperparameters), seed=setting.seed
        )
        init = InitChoice(self.kind.start, {})
        planned = plan_run(spec, task.data, basis, init, setting.base, SUPERVISED, may_search=True)
        return planned.make(run_id, self._built.start(planned.data, planned.plan))

    def published(self, run: TrainRun, task: EncodedTask) -> CoreRun:
        fresh = CoreRun(run.run_id, task.data, run.plan, self._built.basis)
        fresh.R = run.published_R.clone()
        return fresh

    def gather(self, runs: Sequence[TrainRun]) -> Trainer:
        budget = self._setting.token_budget
        trainer = Trainer(self._setting.base, self._built.basis, max_runs=len(runs), token_budget=budget)
        for run in runs:
            assert isinstance(run, CoreRun)
            trainer.join(run)
        return trainer


class LoraForm:
    """A LoRA form, by its preset. Its factors are read from each task's examples if the preset needs data."""

    def __init__(self, setting: Setting, method: Method, rank: int) -> None:
        self._setting = setting
        self._preset = LORA_PRESETS[method.lora_preset]
        self._rank = rank
        self._found: dict[str, LoraFactors] = {}
        self.kind = LoraKind(self._preset.name, rank)
        shapes = form_modules(setting.base, self._preset, rank=rank, target_modules=LLAMA_LINEARS)
        self.num_parameters = rank * sum(
            shape.d_out + (shape.d_in if self._preset.trains_A else 0) for shape in shapes
        )

    def make(self, run_id: str, task: EncodedTask, plan: TrainingPlan) -> LoraRun:
        return LoraRun(run_id, task.data, plan, self._factors(task))

    def automatic(self, run_id: str, task: EncodedTask) -> LoraRun:
        return self.make(run_id, task, plan_of(self._setting, task, self.kind, None))

    def published(self, run: TrainRun, task: EncodedTask) -> LoraRun:
        fresh = LoraRun(run.run_id, task.data, run.plan, self._factors(task))
        fresh.R = run.published_R.clone()
        for (A, _), rule in zip(fresh.trained(fresh.R), fresh.rules, strict=True):
            if rule is not None:
                rule.A = A.clone()
        return fresh

    def gather(self, runs: Sequence[TrainRun]) -> LoraTrainer:
        base, budget = self._setting.base, self._setting.token_budget
        mine = [run for run in runs if isinstance(run, LoraRun)]
        # A local rule learns once per pass, so a step of such runs must be one pass.
        is_online = self._preset.online is not None
        budget = 2**31 if is_online else budget
        min_tokens = 0 if base.device.type == "cpu" and not is_online else budget
        return LoraTrainer(base, mine, token_budget=budget, min_tokens=min_tokens)

    def _factors(self, task: EncodedTask) -> LoraFactors:
        name = "" if self._preset.method is None else task.name
        if name not in self._found:
            self._found[name] = initial_factors(
                self._setting.base, self._preset, rank=self._rank,
                calibration=task.calibration if name else None, seed=self._setting.seed,
            )  # fmt: skip
        return self._found[name]
