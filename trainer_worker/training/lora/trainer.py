"""Training in the papers' own form: B, or A and B, of every target module, for one run or several at once.

Knows no Redis and no clock. Several runs share the passes through the frozen model, as the users of
`training/trainer.py` do (a sweep of learning rates costs little more than one run), and the result of a run
does not depend on the others. Evaluations, early stopping and losses that are not finite follow `TrainRun`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tessera.errors import InvalidInput
from tessera.methods.building.decomposition import module_seed
from tessera.methods.building.hebbian import HebbianRule
from tessera.model.base_model import BaseModel
from trainer_worker.data.training_data import GPU_MIN_TOKENS, MicroBatch, TrainingData
from trainer_worker.training.lora.factors import LORA, Layout, LoraFactors
from trainer_worker.training.lora.linear import BatchOwners, LoraDelta
from trainer_worker.training.lora.single_adapter import METHOD, storage_dtype, to_single_adapter
from trainer_worker.training.objectives.objective import SUPERVISED, Objective, Sample, num_tokens
from trainer_worker.training.objectives.tally import Tally
from trainer_worker.training.optimizers import BatchedOptimizer, UserStep, clip_factor
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.run import RunResult, RunUpdate, TokenCounts, TrainRun
from trainer_worker.training.trainer import token_losses


class LoraRun(TrainRun):
    """A run of a LoRA form. R, m, v, best_R: [2, P], all A's and all B's (`Layout`), instead of cores."""

    def __init__(
        self,
        run_id: str,
        data: TrainingData,
        plan: TrainingPlan,
        factors: LoraFactors,
        *,
        objective: Objective = SUPERVISED,
    ) -> None:
        """The reference of pairs is the base model."""
        self.factors = factors
        self.layout = Layout(factors.modules, factors.rank)
        R = self.layout.pack(factors.A, factors.B)
        super().__init__(run_id, data, plan, R=R, objective=objective)
        self.init_notes = {"method": factors.preset.name}
        self.rules = [self._make_rule(index) for index in range(len(factors.modules))]

    @property
    def basis_id(self) -> str:
        return ""

    @property
    def identity(self) -> str:
        factors = self.factors
        names = [shape.name for shape in factors.modules]
        parts = ["lora", factors.preset.name, factors.rank, factors.seed, names]
        if factors.scaling.is_given or factors.ranks:
            parts += [factors.scale, list(factors.ranks)]
        return json.dumps(parts)

    @property
    def provenance(self) -> dict[str, Any]:
        return {"method": METHOD, "form": LORA, "preset": self.factors.preset.name}

    def make_trainer(self, base: BaseModel, *, max_runs: int, token_budget: int) -> LoraTrainer:
        """Return a trainer for this run alone. Its factors are as large as a basis; sharing saves little."""
        min_tokens = 0 if base.device.type == "cpu" else GPU_MIN_TOKENS
        if self.factors.online is not None:  # a local rule learns from every pass, so make few of them
            min_tokens = token_budget
        return LoraTrainer(base, [self], token_budget=token_budget, min_tokens=min_tokens)

    def to_result(self, base: BaseModel, metadata: dict[str, Any]) -> RunResult:
        """Return the published factors as a private basis and its adapter, by a QR of each module."""
        made = to_single_adapter(
            self.factors,
            self.trained(),
            model_id=base.model_id,
            learning_rate=self.plan.learning_rate,
            metadata=metadata,
            dtype=storage_dtype(base),
        )
        return RunResult(made.adapter, made.basis)

    def more_state(self) -> dict[str, Tensor]:
        """Return the state of the local rules, and the initial factors if their product is subtracted.

        The factors are stored because another device or library version would compute different ones.
        """
        tensors = super().more_state()
        if self.factors.preset.is_subtracted:
            tensors["initial"] = self.layout.pack(self.factors.A, self.factors.B)
        for index, rule in enumerate(self.rules):
            if rule is not None:
                tensors |= {f"rule.{index}.{name}": value for name, value in rule.state().items()}
        return tensors

    def restore_more(self, tensors: dict[str, Tensor]) -> None:
        """Restore the initial factors, if they are subtracted, and the state of the local rules."""
        super().restore_more(tensors)
        if self.factors.preset.is_subtracted:
            initial = tensors["initial"]
            if initial.shape != self.R.shape:
                raise ValueError("initial factors of another shape")
            pairs = [(A.clone(), B.clone()) for A, B in self.layout.views(initial)]
            A0, B0 = (tuple(pair[side] for pair in pairs) for side in (0, 1))
            self.factors = replace(self.factors, A=A0, B=B0)
        for index, ((A, _), rule) in enumerate(zip(self.trained(tensors["R"]), self.rules, strict=True)):
            if rule is not None:
                prefix = f"rule.{index}."
                rule.restore({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
                rule.A = A.clone()

    def _make_rule(self, index: int) -> HebbianRule | None:
        """Return the local rule that trains A of this module, if the form has one."""
        config = self.factors.online
        if config is None:
            return None
        shape, rank = self.factors.modules[index], self.factors.rank
        seed = module_seed(self.factors.seed, "lolora", shape.name, rank)
        rule = HebbianRule(shape.d_in, rank, config, generator=torch.Generator().manual_seed(seed))
        rule.A = self.factors.A[index].clone()
        return rule

    def trained(self, packed: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return A and B of each module, of the state to publish or from `packed` [2, P]."""
        return list(self.layout.views(self.published_R if packed is None else packed))

    def steps(self, slot: int, rate: float, clip: float) -> list[UserStep]:
        """Return the optimizer's steps for the run's two rows, 2 slot (A) and 2 slot + 1 (B)."""
        preset, count = self.factors.preset, self.progress.num_updates
        rows = [(2 * slot, rate)] if preset.trains_A else []
        rows.append((2 * slot + 1, rate * preset.b_rate))
        return [UserStep.of(self.plan, row, size, count, clip) for row, size in rows]


class LoraTrainer:
    """A fixed group of runs that are trained together: equal target modules and rank, any LoRA forms.

    Its memory for K runs: A, B, their gradient and moments, 4 P numbers each with P = 2 r Σ max(d_in, d_out),
    and the initial factors of the runs that subtract them.
    """

    def __init__(
        self, base: BaseModel, runs: Sequence[LoraRun], *, token_budget: int, min_tokens: int = 0
    ) -> None:
        """token_budget: tokens with padding in one pass. min_tokens: a pass smaller than this is not split to
        save padding.

        Local rules (LoLoRA) learn from every pass, so what they learn depends on how a step is split. Give
        such runs a budget and a minimum that hold a whole step of all of them.
        """
        first = runs[0].factors
        if any((run.factors.modules, run.factors.rank) != (first.modules, first.rank) for run in runs):
            raise InvalidInput("runs that train together need the same target modules and rank", param="rank")
        self.base, self.runs = base, list(runs)
        self.token_budget, self.min_tokens = token_budget, min_tokens
        self.tokens = TokenCounts()
        K, layout, device = len(runs), runs[0].layout, base.device
        dtype = torch.float64 if base.model.dtype == torch.float64 else torch.float32
        self._optimizer = BatchedOptimizer((2 * K, 1, 1, layout.width), dtype=dtype, device=device)
        for name in ("R", "m", "v"):
            memory = getattr(self._optimizer, name).view(K, 2, layout.width)
            for slot, run in enumerate(runs):
                memory[slot].copy_(getattr(run, name))
                setattr(run, name, memory[slot])
        self._packed = self._optimizer.R.view(K, 2, layout.width)
        self._grad = torch.zeros_like(self._packed)
        self._owners = BatchOwners(torch.zeros(0, dtype=torch.int64, device=device))
        self._deltas = self._make_deltas()

    @property
    def is_finished(self) -> bool:
        return all(run.is_finished for run in self.runs)

    @property
    def is_reusable(self) -> bool:
        return False

    def try_join(self, run: TrainRun) -> bool:
        """Always False: the group is fixed when the trainer is made."""
        return False

    def leave(self, run_id: str) -> LoraRun | None:
        """End the training of a run that is alone in its trainer; None if it is not this one."""
        if run_id not in [run.run_id for run in self.runs]:
            return None
        [run] = self.runs
        self.release()
        self.runs = []
        return run

    def step(self) -> list[RunUpdate]:
        """Evaluate the runs that are due, then make one optimization step of each unfinished run."""
        active = self._active()
        updates = {slot: RunUpdate(self.runs[slot].run_id) for slot in active}
        waiting = [slot for slot in active if self.runs[slot].awaits_reference]
        if waiting:
            updates |= self._refer(waiting)
        ready = [slot for slot in active if slot not in waiting]
        with self.attached():
            self._evaluate([slot for slot in ready if self.runs[slot].needs_evaluation], updates)
            self._train([slot for slot in ready if not self.runs[slot].is_finished], updates)
        for slot, update in updates.items():
            run = self.runs[slot]
            update.step, update.total_steps = run.progress.step, run.plan.total_steps
            update.trained_tokens = run.progress.trained_tokens
            update.finish_reason = run.progress.finish_reason
        return list(updates.values())

    def release(self) -> None:
        """Give the runs tensors of their own again. The trainer cannot be used afterwards."""
        for run in self.runs:
            for name in ("R", "m", "v"):
                setattr(run, name, getattr(run, name).detach().cpu().clone())

    @contextmanager
    def attached(self, rows: Tensor | None = None) -> Iterator[None]:
        """Put the runs' factors into the model's layers, and take them out afterwards.

        rows: int64 [S], the owners of the rows of the next pass.
        """
        self._owners.tokens = None  # local rules learn only in training steps
        if rows is not None:
            self._owners.rows, self._owners.length = rows, None
        self._copy_learned()
        handles = [
            self.base.model.get_submodule(delta.name).register_forward_hook(delta) for delta in self._deltas
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _make_deltas(self) -> list[LoraDelta]:
        runs, layout = self.runs, self.runs[0].layout
        device, dtype = self._packed.device, self._packed.dtype
        trains_A = any(run.factors.preset.trains_A for run in runs)
        offsets = self._offsets()
        leaves, grads = layout.views(self._packed.detach()), layout.views(self._grad)
        deltas = []
        self._leaves: list[tuple[Tensor, Tensor]] = []  # each with its part of `_grad`
        for index, ((A, B), (grad_A, grad_B)) in enumerate(zip(leaves, grads, strict=True)):
            A.requires_grad_(trains_A)
            B.requires_grad_()
            self._leaves += [(A, grad_A), (B, grad_B)] if trains_A else [(B, grad_B)]
            A0, B0 = (None, None) if offsets is None else offsets[index]
            name = layout.modules[index].name
            scales = [run.factors.scale_of(index) for run in runs]
            scale = torch.tensor(scales, dtype=dtype, device=device)
            deltas.append(LoraDelta(name, A, B, scale, self._owners, A0, B0, self._rules_of(index)))
        return deltas

    def _offsets(self) -> list[tuple[Tensor, Tensor]] | None:
        """A_0 [K, r, d_in] and B_0 [K, d_out, r] of each module, zeros for a run that subtracts nothing."""
        if not any(run.factors.preset.is_subtracted for run in self.runs):
            return None
        packed = torch.zeros_like(self._packed)
        for slot, run in enumerate(self.runs):
            if run.factors.preset.is_subtracted:
                packed[slot] = run.layout.pack(run.factors.A, run.factors.B).to(packed)
        return list(self.runs[0].layout.views(packed))

    def _rules_of(self, index: int) -> list[HebbianRule]:
        """Return the local rules of one module, one per run; empty if no run has any."""
        rules = [rule for run in self.runs if (rule := run.rules[index]) is not None]
        if len(rules) not in (0, len(self.runs)):
            raise InvalidInput("runs with and without a local rule cannot train together", param="init")
        return rules

    @torch.no_grad()
    def _copy_learned(self) -> None:
        """Copy the A's that the local rules have learned into the factors."""
        for delta in self._deltas:
            for slot, rule in enumerate(delta.rules):
                delta.A[slot].copy_(rule.A)

    def _refer(self, slots: Sequence[int]) -> dict[int, RunUpdate]:
        """Compute the reference of some of the pairs of each of these runs: the model without factors."""
        samples = {slot: self.runs[slot].reference_samples(min_tokens=self.min_tokens) for slot in slots}
        with torch.no_grad():
            logps = self._pass(samples).logps()
        return {slot: self.runs[slot].record_reference(logps[slot]) for slot in slots}

    def _evaluate(self, slots: Sequence[int], updates: dict[int, RunUpdate]) -> None:
        with torch.no_grad():
            measured = self._pass({slot: self.runs[slot].validation() for slot in slots}).measured()
        for slot in slots:
            run, update = self.runs[slot], updates[slot]
            if run.data.valid:
                run.show_evaluation(update, measured[slot])
            run.record_evaluation(measured[slot] if run.data.valid else None)

    def _train(self, slots: Sequence[int], updates: dict[int, RunUpdate]) -> None:
        batches = {slot: self.runs[slot].next_batch() for slot in slots}
        measured = self._pass(batches, learn=True).measured()
        trains = [[run.factors.preset.trains_A, True] for run in self.runs]
        self._grad *= torch.tensor(trains, device=self._grad.device)[:, :, None]
        norms = torch.linalg.vector_norm(self._grad, dim=(1, 2)).tolist()
        steps = []
        for slot, batch in batches.items():
            run, update = self.runs[slot], updates[slot]
            update.learning_rate = run.learning_rate
            if not (math.isfinite(measured[slot].loss) and math.isfinite(norms[slot])):
                update.warnings.append(run.record_nonfinite())
                continue
            run.show_step(update, measured[slot])
            clip = clip_factor(norms[slot], run.plan.max_grad_norm)
            run.record_step(measured[slot].loss, num_tokens(batch))
            steps += run.steps(slot, update.learning_rate, clip)
        self._optimizer.step(self._grad.view_as(self._optimizer.R), steps)

    def _pass(self, samples: Mapping[int, Sequence[Sample]], *, learn: bool = False) -> Tally:
        """Send the samples of the slots through the model. With `learn`, `_grad` holds the gradients."""
        objectives = {slot: self.runs[slot].objective for slot in samples}
        tally = Tally(samples, objectives, num_slots=len(self.runs), device=self.base.device)
        self._grad.zero_()
        for batch in tally.passes(token_budget=self.token_budget, min_tokens=self.min_tokens):
            trained = batch.num_tokens if learn else 0
            self.tokens += TokenCounts(trained, batch.num_tokens - trained, batch.num_padding)
            self._owners.rows, self._owners.length = batch.rows, batch.token_ids.shape[1]
            learns_online = learn and bool(self._deltas[0].rules)
            self._owners.tokens = self._tokens_of(batch) if learns_online else None
            losses, is_correct = token_losses(self.base.model, batch)
            weights = tally.add(batch, losses, is_correct)
            if learn:
                self._add_gradients(losses, weights)
            if learns_online:
                self._copy_learned()
        return tally

    def _add_gradients(self, losses: Tensor, weights: Tensor) -> None:
        """Add the gradients to `_grad`. `.grad` must be dense, which parts of one tensor are not."""
        gradients = torch.autograd.grad(losses, [leaf for leaf, _ in self._leaves], weights)
        for (_, part), gradient in zip(self._leaves, gradients, strict=True):
            part += gradient

    def _tokens_of(self, batch: MicroBatch) -> list[Tensor]:
        """Return the indices of each run's tokens in the flattened [S · L] of the pass, without padding."""
        tokens: list[list[int]] = [[] for _ in self.runs]
        longest = batch.token_ids.shape[1]
        for row, (slot, length) in enumerate(zip(batch.rows.tolist(), batch.lengths, strict=True)):
            tokens[slot] += range(row * longest, row * longest + length)
        return [torch.tensor(indices, dtype=torch.int64, device=self.base.device) for indices in tokens]

    def _active(self) -> list[int]:
        return [slot for slot, run in enumerate(self.runs) if not run.is_finished]
